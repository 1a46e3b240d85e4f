"""Parameters: every tensor of a model, declared once by the block that it belongs to.

What the rest needs to know of them is read off the declarations: which tensors a checkpoint must have, what is prepared
and where it goes, how a model is cut among processes, which matrices a measurement goes through.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from kbit.models.mixer_specs import ConvNet, ScanNet
from kbit.models.spec import XIELU, LatentSpec, ModelSpec, SoundSpec

Unit = Literal[
    "heads", "kv_heads", "features", "sinks", "latent keys", "latent values", "expert features", "shared features",
    "delta heads", "delta values", "delta inputs", "scan heads", "scan values", "scan inputs", "conv features",
]  # fmt: skip
Role = Literal["embedding", "linear", "head", "norm", "bias", "router", "rows", "table", "distances", "taps", "task"]

EXPERT_FEATURES: Unit = "expert features"
KEY_HEADS: Unit = "kv_heads"

# What stands outside of the layers, beside embedding and head, and is prepared with them.
OUTSIDE: tuple[Role, ...] = ("norm", "bias", "rows", "table", "router", "distances")

# Linears that read one input and are multiplied in one call.
QKV, GATE_UP, SHARED = ("q", "k", "v"), ("gate", "up"), ("shared_gate", "shared_up")
KEYS_VALUES = ("k", "v")
CROSS_KV = ("cross_k", "cross_v")
CONV, SCAN = ("conv_b", "conv_c", "conv_x"), ("scan_z", "scan_x")
DELTA = ("delta_qkv", "delta_z")

# Of an xIELU (`kbit.models.load`).
XIELU_PARTS = ("positive", "negative", "linear", "eps")


@dataclass(frozen=True)
class Parameter:
    """One tensor.

    Attributes:
        name: in a checkpoint.
        slot: what its block calls it, for example "q" or "attention_norm"; a bias is in the slot of its matrix.
        layer: index, or None outside of layers.
        role: what it is for. Biases of norms are "bias" too, and so are attention sinks. A "router" is a small matrix
            that decides, or one outside of layers, and stays as it is stored where others are quantized: of experts, or
            of how fast a state fades and how much of a token goes into it. A "table" is looked up by token beside the
            embedding, and quantized as that is. "taps" are those of a convolution over tokens.
        shape: (N, K), or (N,); of taps (features, 1, tokens).
        cut: how processes share it: (axis, what that axis consists of), or None where all have it whole. Of a matrix
            whose columns are cut the product is a part of a sum (`Ops.sum_parts`).
        group: slots of the linears that share its input, itself included; empty for what is no linear.
        active: the share of tokens that go through it.
        once: it is added before a sum over processes, so one of them alone has it, and the others zeros.
    """

    name: str
    slot: str
    layer: int | None
    role: Role
    shape: tuple[int, ...]
    cut: tuple[int, Unit] | None = None
    group: tuple[str, ...] = ()
    active: float = 1.0
    once: bool = False


def parameters(spec: ModelSpec) -> tuple[Parameter, ...]:
    """Every tensor that a model needs, in the order of its computation. A tied head is not among them.

    Of an encoder-decoder those of both, each with the layers of its own stack; what they share is named once.
    """
    own = own_parameters(spec)
    if spec.encoder is None:
        return own
    names = {parameter.name for parameter in own}
    return (*(p for p in own_parameters(spec.encoder) if p.name not in names), *own)


def layer_numbers(spec: ModelSpec) -> dict[str, int | None]:
    """The layer of every parameter by name; of an encoder-decoder the decoder's go on where the encoder's end."""
    first = 0 if spec.encoder is None else spec.encoder.layers
    found = {} if spec.encoder is None else {p.name: p.layer for p in own_parameters(spec.encoder)}
    return found | {p.name: None if p.layer is None else first + p.layer for p in own_parameters(spec)}


def own_parameters(spec: ModelSpec) -> tuple[Parameter, ...]:
    """Those of one stack of layers: `parameters`, but of an encoder-decoder the decoder's alone."""
    names, vocabulary = spec.names, (spec.vocab_size, spec.embedding_width)
    found = [Parameter(f"{names.embedding}.weight", "embedding", None, "embedding", vocabulary)]
    if spec.sound is not None:
        found = list(_sound(spec, spec.sound))
    found += _beside_embedding(spec)
    for layer in range(spec.layers):
        if spec.recurs(layer):
            found += _recurrent(spec, layer)
        elif spec.attends(layer):
            found += _attention(spec, layer)
        if spec.scan_beside is not None:
            found += _scan_net(spec, spec.scan_beside, layer)
        if spec.encoder is not None:
            found += _cross(spec, layer)
        if not spec.has_mlp(layer):
            continue
        if spec.experts is not None and spec.experts.beside:
            found += _mlp(spec, layer)
            found += _beside_mlp(spec, layer)
        else:
            found += _experts(spec, layer) if spec.has_experts(layer) else _mlp(spec, layer)
        found += _layer_end(spec, layer)
    found += _norm(spec, "final_norm", None)
    if spec.embedding_size:
        shape = (spec.embedding_size, spec.hidden_size)
        found.append(Parameter(f"{names.project_out}.weight", "project_out", None, "router", shape))
    found += _task(spec)
    if spec.head_bias and spec.task is None:
        found.append(Parameter(f"{names.head}.bias", "head", None, "bias", vocabulary[:1]))
    if not spec.tied_embeddings and spec.has_logits:
        found.append(Parameter(f"{names.head}.weight", "head", None, "head", vocabulary))
    return tuple(found)


def _beside_embedding(spec: ModelSpec) -> Iterator[Parameter]:
    """What `kbit.models.blocks.embedding` reads besides the embedding, and the table of distances."""
    if spec.embedding_size:
        shape = (spec.hidden_size, spec.embedding_size)
        yield Parameter(f"{spec.names.project_in}.weight", "project_in", None, "router", shape)
    for slot, rows in (("positions", spec.position_rows), ("types", spec.types)):
        if rows and not (slot == "positions" and spec.sinusoids is not None):
            name = f"{getattr(spec.names, slot)}.weight"
            yield Parameter(name, slot, None, "rows", (rows, spec.hidden_size))
    yield from _norm(spec, "embedding_norm", None)
    if spec.layer_features:
        hidden, wide, names = spec.hidden_size, spec.layers * spec.layer_features, spec.names
        yield Parameter(f"{names.layer_embedding}.weight", "layer_embedding", None, "table", (spec.layer_tokens, wide))
        yield Parameter(f"{names.layer_features}.weight", "layer_features", None, "router", (wide, hidden))
        yield from _norm(spec, "layer_features_norm", None, spec.layer_features)
    yield from _distances(spec, None)


def _sound(spec: ModelSpec, sound: SoundSpec) -> Iterator[Parameter]:
    """The convolutions of `kbit.models.sound`: a row has all features of its frames, of each feature all frames."""
    for slot, features in (("sound_first", sound.bins), ("sound_second", spec.hidden_size)):
        name, hidden = getattr(spec.names, slot), spec.hidden_size
        yield Parameter(f"{name}.weight", slot, None, "router", (hidden, features * sound.taps))
        yield Parameter(f"{name}.bias", slot, None, "bias", (hidden,))


def _distances(spec: ModelSpec, layer: int | None) -> Iterator[Parameter]:
    """The table of distances of a layer, or of all (None), where the model has it there."""
    template = str(spec.names.distances)
    if spec.distances is not None and ("{layer}" in template) == (layer is not None):
        name = f"{template.format(layer=layer)}.weight"
        yield Parameter(name, "distances", layer, "distances", (spec.distances[0], spec.heads), (1, "sinks"))


def _task(spec: ModelSpec) -> Iterator[Parameter]:
    """What `kbit.engine.heads` reads."""
    if (task := spec.task) is None:
        return
    hidden = spec.hidden_size
    for name, shape, bias in (
        (task.dense, (hidden, hidden), f"{task.dense}.bias" if task.dense_bias else None),
        (task.norm, (hidden,), f"{task.norm}.bias" if task.norm_bias else None),
        (task.out, (task.labels, hidden), task.out_bias),
    ):
        if name is not None:
            yield Parameter(f"{name}.weight", "task", None, "task", shape)
            if bias is not None:
                yield Parameter(bias, "task", None, "task", shape[:1])
    if task.kind == "mask" and task.out_bias is not None:
        yield Parameter(task.out_bias, "task", None, "task", (spec.vocab_size,))


def _attention(spec: ModelSpec, layer: int) -> Iterator[Parameter]:
    """What `kbit.models.blocks.attention` reads."""
    if spec.latent is not None:
        yield from _latent_attention(spec, spec.latent, layer)
        return
    shape = spec.shape(layer)
    hidden, queries, keys = spec.hidden_size, spec.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    own, inputs = qkv(spec, layer), attention_inputs(spec, layer)
    if layer not in spec.unnormed:
        yield from _norm(spec, "attention_norm", layer)
    yield from _linear(spec, "q", layer, (queries, hidden), (0, "heads"), inputs, spec.qkv_bias)
    for slot in own[1:]:
        yield from _linear(spec, slot, layer, (keys, hidden), (0, "kv_heads"), inputs, _biased(spec, slot))
    if spec.names.output_gate is not None:
        yield from _linear(spec, "output_gate", layer, (queries, hidden), (0, "heads"), inputs, spec.qkv_bias)
    whole = spec.qk_norm == "whole"
    yield from _norm(spec, "q_norm", layer, queries if whole else shape.head_dim, (0, "heads") if whole else None)
    if len(own) > 1:
        by_head = (0, KEY_HEADS) if whole else None
        yield from _norm(spec, "k_norm", layer, keys if whole else shape.head_dim, by_head)
    yield from _distances(spec, layer)
    if spec.names.sinks is not None:
        yield Parameter(spec.names.sinks.format(layer=layer), "sinks", layer, "bias", (spec.heads,), (0, "sinks"))
    yield from _norm(spec, "attention_inner_norm", layer, queries, (0, "heads"))
    yield from _linear(spec, "o", layer, (hidden, queries), (1, "heads"), ("o",), spec.output_bias)
    yield from _norm(spec, "attention_post_norm", layer)
    yield from _norm(spec, "attention_sum_norm", layer)


def _delta_net(spec: ModelSpec, layer: int) -> Iterator[Parameter]:
    """What a gated delta net (`kbit.models.blocks`) reads."""
    delta, names, hidden = spec.delta, spec.names, spec.hidden_size
    assert delta is not None
    convolution, _ = delta.at(layer)
    values = delta.heads * delta.value_dim
    yield from _norm(spec, "attention_norm", layer)
    yield from _linear(spec, "delta_qkv", layer, (convolution.features, hidden), (0, "delta inputs"), DELTA, False)
    yield from _linear(spec, "delta_z", layer, (values, hidden), (0, "delta values"), DELTA, False)
    yield from _router(spec, "delta_write", layer, delta.heads, False, (0, "delta heads"))
    yield from _router(spec, "delta_decay", layer, delta.heads, False, (0, "delta heads"))
    for name, slot in ((names.delta_bias, "delta_decay"), (names.delta_rates, "delta_rates")):
        yield Parameter(str(name).format(layer=layer), slot, layer, "bias", (delta.heads,), (0, "delta heads"))
    taps = f"{str(names.delta_taps).format(layer=layer)}.weight"
    shape = (convolution.features, 1, delta.taps)
    yield Parameter(taps, "delta_taps", layer, "taps", shape, (0, "delta inputs"))
    yield from _norm(spec, "delta_norm", layer, delta.value_dim)
    yield from _linear(spec, "delta_out", layer, (hidden, values), (1, "delta values"), ("delta_out",), False)
    yield from _norm(spec, "attention_post_norm", layer)


def _latent_attention(spec: ModelSpec, latent: LatentSpec, layer: int) -> Iterator[Parameter]:
    """What `kbit.models.latent` reads, and attention's last linear."""
    hidden, heads, group = spec.hidden_size, spec.heads, latent_inputs(latent)
    queries, own, values = (heads * dim for dim in (spec.head_dim, spec.head_dim - spec.rope.dim, latent.value_dim))
    yield from _norm(spec, "attention_norm", layer)
    if latent.query_rank:
        yield from _linear(spec, "q_a", layer, (latent.query_rank, hidden), None, group, spec.qkv_bias)
        yield from _norm(spec, "q_a_norm", layer, latent.query_rank)
        yield from _linear(spec, "q", layer, (queries, latent.query_rank), (0, "heads"), ("q",), False)
    else:
        yield from _linear(spec, "q", layer, (queries, hidden), (0, "heads"), group, False)
    yield from _linear(spec, "kv_a", layer, (latent.rank, hidden), None, group, spec.qkv_bias)
    yield from _linear(spec, "k_shared", layer, (spec.rope.dim, hidden), None, group, spec.qkv_bias)
    yield from _norm(spec, "kv_a_norm", layer, latent.rank)
    yield from _linear(spec, "k", layer, (own, latent.rank), (0, "latent keys"), KEYS_VALUES, False)
    yield from _linear(spec, "v", layer, (values, latent.rank), (0, "latent values"), KEYS_VALUES, False)
    yield from _linear(spec, "o", layer, (hidden, values), (1, "latent values"), ("o",), spec.output_bias)


def latent_inputs(latent: LatentSpec) -> tuple[str, str, str]:
    """The slots of what latent attention multiplies its input with."""
    return ("q_a" if latent.query_rank else "q", "kv_a", "k_shared")


def _recurrent(spec: ModelSpec, layer: int) -> Iterator[Parameter]:
    """What a layer reads that does not attend."""
    if spec.scan is not None:
        return _scan_net(spec, spec.scan, layer)
    return _conv_net(spec, spec.conv, layer) if spec.conv is not None else _delta_net(spec, layer)


def _conv_net(spec: ModelSpec, conv: ConvNet, layer: int) -> Iterator[Parameter]:
    """What `kbit.models.mixers.convolved` reads, and the last linear."""
    hidden, features = spec.hidden_size, conv.features
    yield from _norm(spec, "attention_norm", layer)
    for slot in CONV:
        yield from _linear(spec, slot, layer, (features, hidden), (0, "conv features"), CONV, conv.bias)
    yield from _taps(spec, "conv_taps", layer, features, conv.taps, conv.bias, (0, "conv features"))
    yield from _linear(spec, "conv_out", layer, (hidden, features), (1, "conv features"), ("conv_out",), conv.bias)


def _scan_net(spec: ModelSpec, scan: ScanNet, layer: int) -> Iterator[Parameter]:
    """What `kbit.models.mixers.scanned` reads, and the last linear."""
    hidden, inner, names = spec.hidden_size, scan.inner_width, spec.names
    convolution, _ = scan.at(layer)
    if not scan.beside:
        yield from _norm(spec, "attention_norm", layer)
    yield from _linear(spec, "scan_z", layer, (inner, hidden), (0, "scan values"), SCAN, False)
    yield from _linear(spec, "scan_x", layer, (convolution.features, hidden), (0, "scan inputs"), SCAN, False)
    yield from _router(spec, "scan_steps", layer, scan.heads, False, (0, "scan heads"))
    vectors = ((names.scan_bias, "scan_steps"), (names.scan_rates, "scan_rates"), (names.scan_skips, "scan_skips"))
    for name, slot in vectors:
        yield Parameter(str(name).format(layer=layer), slot, layer, "bias", (scan.heads,), (0, "scan heads"))
    yield from _taps(spec, "scan_taps", layer, convolution.features, scan.taps, scan.bias, (0, "scan inputs"))
    if scan.norms:
        yield from _norm(spec, "scan_norm", layer, inner, (0, "scan values"))
    yield from _linear(spec, "scan_out", layer, (hidden, inner), (1, "scan values"), ("scan_out",), False)


def _taps(
    spec: ModelSpec, slot: str, layer: int, features: int, taps: int, bias: bool, cut: tuple[int, Unit] | None = None
) -> Iterator[Parameter]:
    """A convolution over tokens; its bias, which has no matrix, is in a slot of its own."""
    name = str(getattr(spec.names, slot)).format(layer=layer)
    yield Parameter(f"{name}.weight", slot, layer, "taps", (features, 1, taps), cut)
    if bias:
        yield Parameter(f"{name}.bias", f"{slot}_bias", layer, "bias", (features,), cut)


def qkv(spec: ModelSpec, layer: int) -> tuple[str, ...]:
    """The slots of what attention multiplies its input with, queries first."""
    shape = spec.shape(layer)
    if shape.source != layer:
        return ("q",)
    return ("q", "k") if shape.keys_as_values else QKV


def _biased(spec: ModelSpec, slot: str) -> bool:
    """Whether keys or values have a bias."""
    return spec.qkv_bias and (spec.key_bias or slot != "k")


def weightless_norms(spec: ModelSpec, layer: int) -> dict[str, int]:
    """The widths of a layer's norms that have no weight, by slot."""
    shape = spec.shape(layer)
    found = {"v_norm": shape.head_dim} if spec.value_norm and shape.source == layer else {}
    if spec.key_norms and spec.attends(layer) and (not spec.rotated or spec.rotated[layer]):
        found |= {"q_norm": shape.head_dim, "k_norm": shape.head_dim}
    return found


def _cross(spec: ModelSpec, layer: int) -> Iterator[Parameter]:
    """What `kbit.models.blocks.cross` reads, and what makes an encoder's keys and values."""
    hidden, queries, keys = spec.hidden_size, spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    yield from _norm(spec, "cross_norm", layer)
    yield from _linear(spec, "cross_q", layer, (queries, hidden), (0, "heads"), ("cross_q",), spec.qkv_bias)
    yield from _linear(spec, "cross_k", layer, (keys, hidden), (0, "kv_heads"), CROSS_KV, _biased(spec, "k"))
    yield from _linear(spec, "cross_v", layer, (keys, hidden), (0, "kv_heads"), CROSS_KV, spec.qkv_bias)
    yield from _linear(spec, "cross_o", layer, (hidden, queries), (1, "heads"), ("cross_o",), spec.output_bias)
    yield from _norm(spec, "cross_sum_norm", layer)


def _mlp(spec: ModelSpec, layer: int) -> Iterator[Parameter]:
    """What `kbit.models.blocks.mlp` reads."""
    hidden, features = spec.hidden_size, spec.shape(layer).width
    yield from _norm(spec, "mlp_norm", layer)
    inputs = gate_up(spec)
    for slot in inputs:
        yield from _linear(spec, slot, layer, (features, hidden), (0, "features"), inputs, spec.mlp_bias)
    yield from _norm(spec, "mlp_inner_norm", layer, features, (0, "features"))
    yield from _linear(spec, "down", layer, (hidden, features), (1, "features"), ("down",), spec.mlp_bias)
    for part in XIELU_PARTS if spec.activation == XIELU else ():
        name = str(getattr(spec.names, f"xielu_{part}")).format(layer=layer)
        shape = (1,) if part in ("positive", "negative") else ()  # as published
        yield Parameter(name, f"xielu_{part}", layer, "bias", shape)
    yield from _norm(spec, "mlp_post_norm", layer)
    yield from _norm(spec, "mlp_sum_norm", layer)


def attention_inputs(spec: ModelSpec, layer: int) -> tuple[str, ...]:
    """The slots of what attention multiplies its input with, a gate on what it makes last."""
    gate = () if spec.names.output_gate is None else ("output_gate",)
    return (*qkv(spec, layer), *gate)


def gate_up(spec: ModelSpec) -> tuple[str, ...]:
    """The slots of what an MLP multiplies its input with."""
    return GATE_UP if spec.names.gate is not None else ("up",)


def shared_inputs(spec: ModelSpec) -> tuple[str, ...]:
    """The slots of what a shared expert multiplies its input with."""
    return SHARED if spec.names.shared_gate is not None else ("shared_up",)


def expert_slots(experts: int) -> tuple[tuple[str, str, str], ...]:
    """The slots of every expert's gate, up and down."""
    return tuple((f"experts.{i}.gate", f"experts.{i}.up", f"experts.{i}.down") for i in range(experts))


def _experts(spec: ModelSpec, layer: int) -> Iterator[Parameter]:
    """What `kbit.models.blocks.mixture` reads."""
    experts, names, hidden = spec.experts, spec.names, spec.hidden_size
    assert experts is not None
    count, width, shared = experts.routing.experts, experts.width, experts.shared_width
    active = experts.routing.chosen / count
    yield from _norm(spec, "mlp_norm", layer)
    yield from _router(spec, "router", layer, count, experts.router_bias)
    if experts.selection_bias:
        yield Parameter(str(names.selection_bias).format(layer=layer), "selection_bias", layer, "bias", (count,))
    for expert, (gate, up, down) in enumerate(expert_slots(count)):
        for template, slot, shape, group, dim in (
            (names.expert_gate, gate, (width, hidden), (gate, up), 0),
            (names.expert_up, up, (width, hidden), (gate, up), 0),
            (names.expert_down, down, (hidden, width), (down,), 1),
        ):
            if template is None:
                continue
            name, own = str(template).format(layer=layer, expert=expert), (dim, EXPERT_FEATURES)
            group = group if names.expert_gate is not None or slot == down else (up,)
            yield Parameter(f"{name}.weight", slot, layer, "linear", shape, own, group, active)
            if experts.bias:
                rows = own if dim == 0 else None
                yield Parameter(f"{name}.bias", slot, layer, "bias", shape[:1], rows, (), active, dim == 1)
    if shared:
        inputs = shared_inputs(spec)
        features: Unit = "shared features"
        for slot in inputs:
            yield from _linear(spec, slot, layer, (shared, hidden), (0, features), inputs, spec.mlp_bias)
        back = (hidden, shared)
        yield from _linear(spec, "shared_down", layer, back, (1, features), ("shared_down",), spec.mlp_bias)
        if names.shared_switch is not None:
            yield from _router(spec, "shared_switch", layer, 1, False)
    yield from _norm(spec, "mlp_post_norm", layer)


def _beside_mlp(spec: ModelSpec, layer: int) -> Iterator[Parameter]:
    """What `kbit.models.blocks.mixture_beside` reads besides the MLP's: experts, and norms around both."""
    experts, names = spec.experts, spec.names
    assert experts is not None
    yield Parameter(str(names.router_scale).format(layer=layer), "router_scale", layer, "norm", (spec.hidden_size,))
    yield from (p for p in _experts(spec, layer) if p.slot not in ("mlp_norm", "mlp_post_norm"))
    scales = str(names.expert_scales).format(layer=layer)
    yield Parameter(scales, "expert_scales", layer, "bias", (experts.routing.experts,))
    for slot in ("mlp_own_norm", "experts_norm", "experts_post_norm"):
        yield from _norm(spec, slot, layer)


def _layer_end(spec: ModelSpec, layer: int) -> Iterator[Parameter]:
    """What comes after attention and MLP: see `kbit.models.per_layer`, and a factor on the layer's result."""
    hidden, own = spec.hidden_size, spec.layer_features
    if own:
        yield from _linear(spec, "layer_gate", layer, (own, hidden), None, ("layer_gate",), False)
        yield from _linear(spec, "layer_up", layer, (hidden, own), None, ("layer_up",), False)
        yield from _norm(spec, "layer_post_norm", layer)
    if spec.names.layer_scale is not None:
        yield Parameter(spec.names.layer_scale.format(layer=layer), "layer_scale", layer, "bias", (1,))


def _router(
    spec: ModelSpec, slot: str, layer: int, rows: int, bias: bool, cut: tuple[int, Unit] | None = None
) -> Iterator[Parameter]:
    name = str(getattr(spec.names, slot)).format(layer=layer)
    yield Parameter(f"{name}.weight", slot, layer, "router", (rows, spec.hidden_size), cut)
    if bias:
        yield Parameter(f"{name}.bias", slot, layer, "bias", (rows,))


def _linear(
    spec: ModelSpec,
    slot: str,
    layer: int,
    shape: tuple[int, int],
    cut: tuple[int, Unit] | None,
    group: tuple[str, ...],
    bias: bool,
) -> Iterator[Parameter]:
    name = str(getattr(spec.names, slot)).format(layer=layer)
    yield Parameter(f"{name}.weight", slot, layer, "linear", shape, cut, group)
    if bias:
        # Where columns are cut, the bias is added to the sum of the parts: whole, in every process.
        yield Parameter(f"{name}.bias", slot, layer, "bias", shape[:1], cut if cut and cut[0] == 0 else None)


def _norm(
    spec: ModelSpec, slot: str, layer: int | None, width: int | None = None, cut: tuple[int, Unit] | None = None
) -> Iterator[Parameter]:
    """A norm's parameters; width: of its weight, or the residual stream's. One that is cut is over all processes'."""
    template = getattr(spec.names, slot)
    if template is None:
        return
    name = str(template).format(layer=layer)
    shape = (spec.hidden_size if width is None else width,)
    yield Parameter(f"{name}.weight", slot, layer, "norm", shape, cut)
    if spec.norm_bias:
        yield Parameter(f"{name}.bias", slot, layer, "bias", shape, cut)
