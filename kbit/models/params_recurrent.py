"""Parameters of layers that do not attend: gated delta nets, short convolutions, state spaces."""

from __future__ import annotations

from collections.abc import Iterator

from kbit.models.mixer_specs import ConvNet, ScanNet
from kbit.models.parameter import Parameter, linear_of, norm_of, router_of, taps_of
from kbit.models.spec import ModelSpec

CONV, SCAN = ("conv_b", "conv_c", "conv_x"), ("scan_z", "scan_x")
DELTA = ("delta_qkv", "delta_z")


def _delta_net(spec: ModelSpec, layer: int) -> Iterator[Parameter]:
    """What a gated delta net (`kbit.models.blocks`) reads."""
    delta, names, hidden = spec.delta, spec.names, spec.hidden_size
    assert delta is not None
    convolution, _ = delta.at(layer)
    values = delta.heads * delta.value_dim
    yield from norm_of(spec, "attention_norm", layer)
    yield from linear_of(spec, "delta_qkv", layer, (convolution.features, hidden), (0, "delta inputs"), DELTA, False)
    yield from linear_of(spec, "delta_z", layer, (values, hidden), (0, "delta values"), DELTA, False)
    yield from router_of(spec, "delta_write", layer, delta.heads, False, (0, "delta heads"))
    yield from router_of(spec, "delta_decay", layer, delta.heads, False, (0, "delta heads"))
    for name, slot in ((names.delta_bias, "delta_decay"), (names.delta_rates, "delta_rates")):
        yield Parameter(str(name).format(layer=layer), slot, layer, "bias", (delta.heads,), (0, "delta heads"))
    taps = f"{str(names.delta_taps).format(layer=layer)}.weight"
    shape = (convolution.features, 1, delta.taps)
    yield Parameter(taps, "delta_taps", layer, "taps", shape, (0, "delta inputs"))
    yield from norm_of(spec, "delta_norm", layer, delta.value_dim)
    yield from linear_of(spec, "delta_out", layer, (hidden, values), (1, "delta values"), ("delta_out",), False)
    yield from norm_of(spec, "attention_post_norm", layer)


def recurrent(spec: ModelSpec, layer: int) -> Iterator[Parameter]:
    """What a layer reads that does not attend."""
    if spec.scan is not None:
        return scan_net(spec, spec.scan, layer)
    return _conv_net(spec, spec.conv, layer) if spec.conv is not None else _delta_net(spec, layer)


def _conv_net(spec: ModelSpec, conv: ConvNet, layer: int) -> Iterator[Parameter]:
    """What `kbit.models.mixers.convolved` reads, and the last linear."""
    hidden, features = spec.hidden_size, conv.features
    yield from norm_of(spec, "attention_norm", layer)
    for slot in CONV:
        yield from linear_of(spec, slot, layer, (features, hidden), (0, "conv features"), CONV, conv.bias)
    yield from taps_of(spec, "conv_taps", layer, features, conv.taps, conv.bias, (0, "conv features"))
    yield from linear_of(spec, "conv_out", layer, (hidden, features), (1, "conv features"), ("conv_out",), conv.bias)


def scan_net(spec: ModelSpec, scan: ScanNet, layer: int) -> Iterator[Parameter]:
    """What `kbit.models.mixers.scanned` reads, and the last linear."""
    hidden, inner, names = spec.hidden_size, scan.inner_width, spec.names
    convolution, _ = scan.at(layer)
    if not scan.beside:
        yield from norm_of(spec, "attention_norm", layer)
    yield from linear_of(spec, "scan_z", layer, (inner, hidden), (0, "scan values"), SCAN, False)
    yield from linear_of(spec, "scan_x", layer, (convolution.features, hidden), (0, "scan inputs"), SCAN, False)
    yield from router_of(spec, "scan_steps", layer, scan.heads, False, (0, "scan heads"))
    vectors = ((names.scan_bias, "scan_steps"), (names.scan_rates, "scan_rates"), (names.scan_skips, "scan_skips"))
    for name, slot in vectors:
        yield Parameter(str(name).format(layer=layer), slot, layer, "bias", (scan.heads,), (0, "scan heads"))
    yield from taps_of(spec, "scan_taps", layer, convolution.features, scan.taps, scan.bias, (0, "scan inputs"))
    if scan.norms:
        yield from norm_of(spec, "scan_norm", layer, inner, (0, "scan values"))
    yield from linear_of(spec, "scan_out", layer, (hidden, inner), (1, "scan values"), ("scan_out",), False)
