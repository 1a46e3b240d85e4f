"""Parameters: every tensor of a model, declared once by the block that it belongs to.

What the rest needs to know of them is read off the declarations: which tensors a checkpoint must have, what is prepared
and where it goes, how a model is cut among processes, which matrices a measurement goes through.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from kbit.models.spec import ModelSpec

Unit = Literal["heads", "kv_heads", "features"]
Role = Literal["embedding", "linear", "head", "norm", "bias"]

# Linears that read one input and are multiplied in one call.
QKV, GATE_UP = ("q", "k", "v"), ("gate", "up")


@dataclass(frozen=True)
class Parameter:
    """One tensor.

    Attributes:
        name: in a checkpoint.
        slot: what its block calls it, for example "q" or "attention_norm"; a bias is in the slot of its matrix.
        layer: index, or None outside of layers.
        role: what it is for. Biases of norms are "bias" too.
        shape: (N, K), or (N,).
        cut: how processes share it: (axis, what that axis consists of), or None where all have it whole. Of a matrix
            whose columns are cut the product is a part of a sum (`Ops.sum_parts`).
        group: slots of the linears that share its input, itself included; empty for what is no linear.
    """

    name: str
    slot: str
    layer: int | None
    role: Role
    shape: tuple[int, ...]
    cut: tuple[int, Unit] | None = None
    group: tuple[str, ...] = ()


def parameters(spec: ModelSpec) -> tuple[Parameter, ...]:
    """Every tensor that a model needs, in the order of its computation. A tied head is not among them."""
    names, vocabulary = spec.names, (spec.vocab_size, spec.hidden_size)
    found = [Parameter(f"{names.embedding}.weight", "embedding", None, "embedding", vocabulary)]
    for layer in range(spec.layers):
        found += _attention(spec, layer)
        found += _mlp(spec, layer)
    found += _norm(spec, "final_norm", None)
    if not spec.tied_embeddings:
        found.append(Parameter(f"{names.head}.weight", "head", None, "head", vocabulary))
    return tuple(found)


def _attention(spec: ModelSpec, layer: int) -> Iterator[Parameter]:
    """What `kbit.models.blocks.attention` reads."""
    hidden, queries, keys = spec.hidden_size, spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    yield from _norm(spec, "attention_norm", layer)
    yield from _linear(spec, "q", layer, (queries, hidden), (0, "heads"), QKV, spec.qkv_bias)
    yield from _linear(spec, "k", layer, (keys, hidden), (0, "kv_heads"), QKV, spec.qkv_bias)
    yield from _linear(spec, "v", layer, (keys, hidden), (0, "kv_heads"), QKV, spec.qkv_bias)
    whole = spec.qk_norm == "whole"
    yield from _norm(spec, "q_norm", layer, queries if whole else spec.head_dim)
    yield from _norm(spec, "k_norm", layer, keys if whole else spec.head_dim)
    yield from _linear(spec, "o", layer, (hidden, queries), (1, "heads"), ("o",), spec.output_bias)
    yield from _norm(spec, "attention_post_norm", layer)


def _mlp(spec: ModelSpec, layer: int) -> Iterator[Parameter]:
    """What `kbit.models.blocks.mlp` reads."""
    hidden, features = spec.hidden_size, spec.intermediate_size
    yield from _norm(spec, "mlp_norm", layer)
    yield from _linear(spec, "gate", layer, (features, hidden), (0, "features"), GATE_UP, spec.mlp_bias)
    yield from _linear(spec, "up", layer, (features, hidden), (0, "features"), GATE_UP, spec.mlp_bias)
    yield from _linear(spec, "down", layer, (hidden, features), (1, "features"), ("down",), spec.mlp_bias)
    yield from _norm(spec, "mlp_post_norm", layer)


def _linear(
    spec: ModelSpec,
    slot: str,
    layer: int,
    shape: tuple[int, int],
    cut: tuple[int, Unit],
    group: tuple[str, ...],
    bias: bool,
) -> Iterator[Parameter]:
    name = str(getattr(spec.names, slot)).format(layer=layer)
    yield Parameter(f"{name}.weight", slot, layer, "linear", shape, cut, group)
    if bias:
        # Where columns are cut, the bias is added to the sum of the parts: whole, in every process.
        yield Parameter(f"{name}.bias", slot, layer, "bias", shape[:1], cut if cut[0] == 0 else None)


def _norm(spec: ModelSpec, slot: str, layer: int | None, width: int | None = None) -> Iterator[Parameter]:
    """A norm's parameters; width: of its weight, or the residual stream's."""
    template = getattr(spec.names, slot)
    if template is None:
        return
    name = str(template).format(layer=layer)
    shape = (spec.hidden_size if width is None else width,)
    yield Parameter(f"{name}.weight", slot, layer, "norm", shape)
    if spec.norm_bias:
        yield Parameter(f"{name}.bias", slot, layer, "bias", shape)
