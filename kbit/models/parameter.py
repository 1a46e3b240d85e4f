"""One tensor of a model, and the kinds that most blocks have."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from kbit.models.spec import ModelSpec

Unit = Literal[
    "heads", "kv_heads", "features", "sinks", "latent keys", "latent values", "expert features", "shared features",
    "delta heads", "delta values", "delta inputs", "scan heads", "scan values", "scan inputs", "conv features",
]  # fmt: skip
Role = Literal["embedding", "linear", "head", "norm", "bias", "router", "rows", "table", "distances", "taps", "task"]


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


def router_of(
    spec: ModelSpec, slot: str, layer: int, rows: int, bias: bool, cut: tuple[int, Unit] | None = None
) -> Iterator[Parameter]:
    """A small matrix that decides, from the residual stream to so many rows; it is not quantized."""
    name = str(getattr(spec.names, slot)).format(layer=layer)
    yield Parameter(f"{name}.weight", slot, layer, "router", (rows, spec.hidden_size), cut)
    if bias:
        yield Parameter(f"{name}.bias", slot, layer, "bias", (rows,))


def linear_of(
    spec: ModelSpec,
    slot: str,
    layer: int,
    shape: tuple[int, int],
    cut: tuple[int, Unit] | None,
    group: tuple[str, ...],
    bias: bool,
) -> Iterator[Parameter]:
    """A matrix of a layer that is quantized, and its bias; see `Parameter` for the rest."""
    name = str(getattr(spec.names, slot)).format(layer=layer)
    yield Parameter(f"{name}.weight", slot, layer, "linear", shape, cut, group)
    if bias:
        # Where columns are cut, the bias is added to the sum of the parts: whole, in every process.
        yield Parameter(f"{name}.bias", slot, layer, "bias", shape[:1], cut if cut and cut[0] == 0 else None)


def norm_of(
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


def taps_of(
    spec: ModelSpec, slot: str, layer: int, features: int, taps: int, bias: bool, cut: tuple[int, Unit] | None = None
) -> Iterator[Parameter]:
    """A convolution over tokens; its bias, which has no matrix, is in a slot of its own."""
    name = str(getattr(spec.names, slot)).format(layer=layer)
    yield Parameter(f"{name}.weight", slot, layer, "taps", (features, 1, taps), cut)
    if bias:
        yield Parameter(f"{name}.bias", f"{slot}_bias", layer, "bias", (features,), cut)
