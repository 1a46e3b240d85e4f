"""The blocks that models consist of: what they hold (`kbit.models.params` declares it) and what they compute."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kbit.graph.ops import Attention, Ops, Vector, Weight, X
from kbit.models.params import GATE_UP, QKV
from kbit.models.spec import ModelSpec


@dataclass(frozen=True, eq=False)
class Linear:
    """A prepared matrix and its bias."""

    weight: Weight
    bias: Vector | None


@dataclass(frozen=True, eq=False)
class Weights:
    """The prepared parameters of a layer, or of what lies outside of layers, by their slots.

    Attributes:
        matrices: of linears.
        norms: weights of norms.
        biases: of linears and norms.
    """

    matrices: Mapping[str, Weight] = field(default_factory=dict)
    norms: Mapping[str, Vector] = field(default_factory=dict)
    biases: Mapping[str, Vector] = field(default_factory=dict)

    def linear(self, slot: str) -> Linear:
        """A matrix with its bias."""
        return Linear(self.matrices[slot], self.biases.get(slot))

    def linears(self, slots: tuple[str, ...]) -> tuple[Linear, ...]:
        """Several, in this order."""
        return tuple(self.linear(slot) for slot in slots)


def layer(ops: Ops[X], spec: ModelSpec, weights: Weights, index: int, x: X) -> X:
    """One layer on the residual stream: (..., hidden) -> (..., hidden)."""
    return mlp(ops, spec, weights, attention(ops, spec, weights, index, x))


def attention(ops: Ops[X], spec: ModelSpec, weights: Weights, index: int, x: X) -> X:
    """x + attention(norm(x)), and a norm of what is added where the model has one: (..., hidden)."""
    q, k, v = _together(ops, weights, QKV, norm(ops, spec, weights, "attention_norm", x))
    described = Attention(
        layer=min(index, spec.cache_layers - 1),
        heads=spec.heads,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        scale=spec.attention_scale,
        window=spec.windows[index],
        mask=spec.mask,
    )
    # Where angles depend on the length of the text, a bias that turned with other angles could not be put back.
    key_bias = None if spec.rope.depends_on_length else weights.biases.get("k")
    seen = ops.self_attention(q, k, v, described, key_bias)  # (..., H D)
    return _added(ops, spec, weights, "o", "attention_post_norm", seen, x)


def mlp(ops: Ops[X], spec: ModelSpec, weights: Weights, x: X) -> X:
    """x + MLP(norm(x)), and a norm of what is added where the model has one: (..., hidden)."""
    gate, up = _together(ops, weights, GATE_UP, norm(ops, spec, weights, "mlp_norm", x))
    inner = ops.activate(gate, up, spec.activation)  # (..., intermediate)
    return _added(ops, spec, weights, "down", "mlp_post_norm", inner, x)


def norm(ops: Ops[X], spec: ModelSpec, weights: Weights, slot: str, x: X) -> X:
    """The norm in a slot, or x itself where the model has none there: (..., hidden)."""
    weight = weights.norms.get(slot)
    if weight is None:
        return x
    if spec.norm == "layer":
        return ops.layer_norm(x, weight, weights.biases.get(slot), spec.norm_eps)
    return ops.norm(x, weight, spec.norm_eps)


def _together(ops: Ops[X], weights: Weights, slots: tuple[str, ...], x: X) -> tuple[X, ...]:
    """Linears that share an input."""
    linears = weights.linears(slots)
    return ops.linear_group([linear.weight for linear in linears], x, [linear.bias for linear in linears])


def _added(ops: Ops[X], spec: ModelSpec, weights: Weights, slot: str, post_norm: str, inner: X, x: X) -> X:
    """A block's last linear, of which every process has a part, on the residual stream: (..., hidden)."""
    linear = weights.linear(slot)
    out = ops.sum_parts(ops.linear(linear.weight, inner), linear.bias)
    return ops.add(x, norm(ops, spec, weights, post_norm, out))
