"""The blocks that models consist of: what they hold (`kbit.models.params` declares it) and what they compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kbit.graph.experts import Experts, Mixture
from kbit.graph.ops import Attention, Ops, Vector, Weight, X
from kbit.models.latent import latent_heads, latent_queries, latent_values
from kbit.models.mixers import convolved, scaled, scanned, together
from kbit.models.params import CROSS_KV, attention_inputs, expert_slots, gate_up, shared_inputs
from kbit.models.positioned import positioned
from kbit.models.spec import SQUARED, XIELU, ModelSpec


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
        biases: of linears and norms, and all other vectors.
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


def layer(
    ops: Ops[X],
    spec: ModelSpec,
    weights: Weights,
    index: int,
    x: X,
    by_distance: Vector | None = None,
    own: X | None = None,
) -> X:
    """One layer on the residual stream: (..., hidden) -> (..., hidden).

    Args:
        by_distance: what is added to scores by distance.
        own: the layer's own features of the tokens (`kbit.models.per_layer`).
    """
    if spec.parallel:
        return _parallel(ops, spec, weights, index, x, by_distance)
    if not spec.mixing or spec.mixing[index]:
        x = attention(ops, spec, weights, index, x, by_distance)
    if not spec.has_mlp(index):
        return x
    if spec.encoder is not None:
        x = cross(ops, spec, weights, index, x)
    if spec.has_experts(index):
        beside = spec.experts is not None and spec.experts.beside
        x = mixture_beside(ops, spec, weights, x) if beside else mixture(ops, spec, weights, x)
    else:
        x = mlp(ops, spec, weights, x)
    if own is not None:
        x = with_features(ops, spec, weights, x, own)
    scale = weights.biases.get("layer_scale")
    return x if scale is None else ops.scale(x, scale)


def attention(ops: Ops[X], spec: ModelSpec, weights: Weights, index: int, x: X, by_distance: Vector | None = None) -> X:
    """x + attention(norm(x)), and norms of what is added and of the sum where the model has them: (..., hidden)."""
    normed = norm(ops, spec, weights, "attention_norm", x)
    if spec.recurs(index):
        out, inner = _recurrent(ops, spec, weights, index, normed)
        return _added(ops, spec, weights, out, "attention_post_norm", inner, x)
    seen = _attended(ops, spec, weights, index, normed, by_distance)
    if spec.scan_beside is not None:
        said = scanned(ops, spec, spec.scan_beside, weights, index, normed)
        x = _added(ops, spec, weights, "scan_out", "attention_post_norm", said, x, spec.scan_beside.out)
    x = _added(ops, spec, weights, "o", "attention_post_norm", seen, x, spec.multipliers.output)
    return norm(ops, spec, weights, "attention_sum_norm", x)


def cross(ops: Ops[X], spec: ModelSpec, weights: Weights, index: int, x: X) -> X:
    """x + attention of norm(x) to the encoder's text, and the norm of the sum where the model has it: (..., hidden)."""
    (q,) = together(ops, weights, ("cross_q",), norm(ops, spec, weights, "cross_norm", x))
    seen = ops.cross_attention(q, cross_attention(spec, index))
    x = _added(ops, spec, weights, "cross_o", "cross_post_norm", seen, x)
    return norm(ops, spec, weights, "cross_sum_norm", x)


def cross_attention(spec: ModelSpec, index: int) -> Attention:
    """What a decoder's layer attends to: in the encoder's cache, behind the one layer of its own."""
    return Attention(
        1 + index, spec.heads, spec.kv_heads, spec.head_dim, spec.attention_scale, None, "cross", "encoder", "none"
    )


def store_keys(ops: Ops[X], spec: ModelSpec, layers: Sequence[Weights], states: X) -> None:
    """Leaves what a decoder's layers attend to of an encoder's hidden states (..., hidden)."""
    for index, weights in enumerate(layers):
        k, v = together(ops, weights, CROSS_KV, states)
        ops.store_keys(k, v, cross_attention(spec, index))


def _parallel(ops: Ops[X], spec: ModelSpec, weights: Weights, index: int, x: X, by_distance: Vector | None) -> X:
    """x + attention(norm(x)) + MLP(norm(x)), by one norm or two: (..., hidden)."""
    of_attention = norm(ops, spec, weights, "attention_norm", x)
    of_mlp = norm(ops, spec, weights, "mlp_norm", x) if spec.names.mlp_norm is not None else of_attention
    seen = _attended(ops, spec, weights, index, of_attention, by_distance)
    inner = _features(ops, spec, weights, of_mlp)
    x = _added(ops, spec, weights, "o", "attention_post_norm", seen, x)
    return _added(ops, spec, weights, "down", "mlp_post_norm", inner, x)


def _attended(ops: Ops[X], spec: ModelSpec, weights: Weights, index: int, normed: X, by_distance: Vector | None) -> X:
    """Attention, but for its last linear: (..., hidden) -> (..., H D_v)."""
    gate: X | None = None
    k: X | None
    v: X | None
    if spec.latent is None:
        q, *own = together(ops, weights, attention_inputs(spec, index), normed)
        gate = own.pop() if spec.names.output_gate is not None else None
        k, v = (own[0], own[-1]) if own else (None, None)  # values may be keys before their norm
    else:
        q, k, v = latent_heads(ops, spec, spec.latent, weights, normed)
    q, k, turns = positioned(ops, spec, weights, index, q, k)
    if v is not None and "v_norm" in weights.norms:
        v = ops.norm(v, weights.norms["v_norm"], spec.norm_eps)
    if spec.keeps_latents:
        q = latent_queries(ops, spec, weights, q)
    kv_heads, head_dim = spec.cache_size(index)
    described = Attention(
        layer=spec.cache_layer(index),
        heads=spec.heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        scale=spec.attention_scale,
        window=spec.windows[index],
        mask=spec.mask,
        positions="none" if turns is None else "rotary",
        angles=turns if spec.several_rotations else None,
        soft_cap=spec.score_cap,
        latent=spec.keeps_latents,
        chunked=spec.chunked and spec.windows[index] is not None,
    )
    # What a norm has scaled is no constant part of keys; and where angles depend on the length of the text, or are
    # several, a bias that turned with other angles could not be put back.
    single = len(spec.ropes) == 1 and not spec.rope.depends_on_length
    # (With a cap or sinks, what features that do not turn add to every score counts, too.)
    sinks = weights.biases.get("sinks")
    shifted = spec.score_cap is not None or (sinks is not None and spec.rope.dim < spec.head_dim)
    normed_keys = spec.names.k_norm is not None or spec.key_norms
    constant = turns is not None and single and not normed_keys and not shifted
    key_bias = weights.biases.get("k") if constant else None
    seen = ops.self_attention(q, k, v, described, key_bias, sinks, weights.biases.get("distances", by_distance))
    seen = seen if gate is None else ops.sigmoid_gate(seen, gate)
    seen = _inner_norm(ops, spec, weights, "attention_inner_norm", seen)
    return seen if spec.latent is None else latent_values(ops, spec, spec.latent, weights, seen)


def _recurrent(ops: Ops[X], spec: ModelSpec, weights: Weights, index: int, normed: X) -> tuple[str, X]:
    """What a layer that does not attend computes: the slot of its last linear, and what that reads."""
    if spec.scan is not None:
        return "scan_out", scanned(ops, spec, spec.scan, weights, index, normed)
    if spec.conv is not None:
        return "conv_out", convolved(ops, spec.conv, weights, index, normed)
    return "delta_out", _recurred(ops, spec, weights, index, normed)


def _recurred(ops: Ops[X], spec: ModelSpec, weights: Weights, index: int, normed: X) -> X:
    """A gated delta net as Qwen3-Next has it, but for its last linear: (..., hidden) -> (..., H D_v).

    Queries, keys and values are convolved over a few tokens and activated before they reach the state; what it says is
    normalised by head, and multiplied with a gate, whose activation is a silu always.
    """
    assert spec.delta is not None
    convolution, recurrence = spec.delta.at(index)
    slots = ("delta_qkv", "delta_z", "delta_decay", "delta_write")
    qkv, z, decay, write = together(ops, weights, slots, normed)
    qkv = ops.activate(ops.short_convolution(qkv, weights.biases["delta_taps"], convolution), None, spec.activation)
    out = ops.recur(qkv, decay, write, weights.biases["delta_rates"], recurrence)
    return ops.activate(z, ops.norm(out, weights.norms["delta_norm"], spec.norm_eps), "silu")


def mlp(ops: Ops[X], spec: ModelSpec, weights: Weights, x: X) -> X:
    """x + MLP(norm(x)), and norms of what is added and of the sum where the model has them: (..., hidden)."""
    inner = _features(ops, spec, weights, norm(ops, spec, weights, "mlp_norm", x))
    x = _added(ops, spec, weights, "down", "mlp_post_norm", inner, x, spec.multipliers.down)
    return norm(ops, spec, weights, "mlp_sum_norm", x)


def mixture(ops: Ops[X], spec: ModelSpec, weights: Weights, x: X) -> X:
    """x + experts(norm(x)), and what a shared expert makes of norm(x) where the model has one: (..., hidden)."""
    experts = spec.experts
    assert experts is not None
    inner, router = norm(ops, spec, weights, "mlp_norm", x), weights.linear("router")
    out = _of_experts(ops, spec, weights, inner, ops.linear(router.weight, inner, router.bias))
    if experts.shared_width:
        gate, *up = together(ops, weights, shared_inputs(spec), inner)
        down = weights.linear("shared_down")
        shared = ops.linear(down.weight, _activated(ops, spec, weights, gate, up))
        if down.bias is not None:  # which is added once, whoever shares the model
            out, shared = ops.sum_parts(out), ops.sum_parts(shared, down.bias)
        switch = weights.matrices.get("shared_switch")
        if switch is not None:
            shared = ops.sigmoid_gate(shared, ops.linear(switch, inner))
        out = ops.add(out, shared)
        if down.bias is not None:
            return _to_residual(ops, spec, weights, "mlp_post_norm", out, x)
    out = ops.sum_parts(out)
    return _to_residual(ops, spec, weights, "mlp_post_norm", out, x)


def mixture_beside(ops: Ops[X], spec: ModelSpec, weights: Weights, x: X) -> X:
    """x + what an MLP makes of norm(x), and experts of x under another norm; norms of both, and of their sum: (...,
    hidden). The router has a norm of its own, whose result has length 1."""
    inner = _features(ops, spec, weights, norm(ops, spec, weights, "mlp_norm", x))
    down = weights.linear("down")
    dense = norm(ops, spec, weights, "mlp_own_norm", ops.sum_parts(ops.linear(down.weight, inner), down.bias))
    routed = ops.norm(x, weights.norms["router_scale"], spec.norm_eps)
    logits = ops.scale(ops.linear(weights.matrices["router"], routed), float(spec.hidden_size**-0.5))
    mixed = ops.sum_parts(_of_experts(ops, spec, weights, norm(ops, spec, weights, "experts_norm", x), logits))
    out = ops.add(dense, norm(ops, spec, weights, "experts_post_norm", mixed))
    return _to_residual(ops, spec, weights, "mlp_post_norm", out, x)


def _of_experts(ops: Ops[X], spec: ModelSpec, weights: Weights, inner: X, logits: X) -> X:
    """What the experts that logits choose make of rows (..., hidden)."""
    experts = spec.experts
    assert experts is not None
    slots = expert_slots(experts.routing.experts)
    columns = list(zip(*slots, strict=True))
    # (Without gates the square of a relu is a relu times what it is of.)
    gates, ups, downs = (weights.linears(columns[at if spec.names.expert_gate else max(at, 1)]) for at in range(3))
    activation = "relu" if spec.activation == SQUARED else spec.activation
    parameters = Experts(
        gates=tuple(linear.weight for linear in gates),
        ups=tuple(linear.weight for linear in ups),
        downs=tuple(linear.weight for linear in downs),
        gate_biases=tuple(linear.bias for linear in gates),
        up_biases=tuple(linear.bias for linear in ups),
        down_biases=tuple(linear.bias for linear in downs),
        selection_bias=weights.biases.get("selection_bias"),
        scales=weights.biases.get("expert_scales"),
    )
    return ops.experts(inner, logits, parameters, Mixture(experts.routing, activation, experts.clamp))


def _features(ops: Ops[X], spec: ModelSpec, weights: Weights, normed: X) -> X:
    """The MLP, but for its last linear: (..., hidden) -> (..., intermediate)."""
    gate, *up = together(ops, weights, gate_up(spec), normed)
    inner = _activated(ops, spec, weights, scaled(ops, gate, spec.multipliers.gate), up)
    return _inner_norm(ops, spec, weights, "mlp_inner_norm", inner)


def _activated(ops: Ops[X], spec: ModelSpec, weights: Weights, gate: X, up: list[X]) -> X:
    """act(gate) up, or act(gate) where there is no up: (..., intermediate)."""
    if spec.activation == SQUARED:
        return ops.activate(gate, ops.multiply(gate, up[0]) if up else gate, "relu")
    if spec.activation == XIELU:  # p x^2, or n (e^x - 1 - x), and b x
        above = ops.scale(ops.activate(gate, gate, "relu"), weights.biases["xielu_positive"])
        below = ops.scale(ops.activate(gate, None, "elu"), weights.biases["xielu_negative"])
        return ops.add(ops.add(above, below), ops.scale(gate, weights.biases["xielu_linear"]))
    return ops.activate(gate, up[0] if up else None, spec.activation)


def norm(ops: Ops[X], spec: ModelSpec, weights: Weights, slot: str, x: X) -> X:
    """The norm in a slot, or x itself where the model has none there: (..., hidden)."""
    weight = weights.norms.get(slot)
    if weight is None:
        return x
    if spec.norm == "layer":
        return ops.layer_norm(x, weight, weights.biases.get(slot), spec.norm_eps)
    return ops.norm(x, weight, spec.norm_eps)


def _inner_norm(ops: Ops[X], spec: ModelSpec, weights: Weights, slot: str, x: X) -> X:
    """The RMS norm of what a block's last linear reads, of which every process has a part; x itself without one."""
    weight = weights.norms.get(slot)
    return x if weight is None else ops.norm(x, weight, spec.norm_eps, parts=True)


def embedding(ops: Ops[X], spec: ModelSpec, weight: Weight, outside: Weights, ids: X) -> X:
    """The residual stream before the first layer, of tokens, and where the model has them their positions and types:
    (..., hidden)."""
    x = ops.embed(weight, ids)
    if spec.embedding_multiplier != 1.0:
        x = ops.scale(x, spec.embedding_multiplier)
    if spec.embedding_size:
        x = ops.linear(outside.matrices["project_in"], x)
    if spec.types:
        x = ops.add(x, ops.look_up(outside.matrices["types"], "types"))
    if spec.position_rows:
        x = ops.add(x, ops.look_up(outside.matrices["positions"], "positions", spec.first_position))
    return norm(ops, spec, outside, "embedding_norm", x)


def narrowed(ops: Ops[X], spec: ModelSpec, outside: Weights, x: X) -> X:
    """What follows the layers before the head: nothing, or, where embeddings are narrower than the residual stream, the
    final norm and a projection: (..., hidden) -> (..., embedding_width)."""
    if not spec.embedding_size:
        return x
    return ops.linear(outside.matrices["project_out"], norm(ops, spec, outside, "final_norm", x))


def head(ops: Ops[X], spec: ModelSpec, weights: Weights, weight: Weight, hidden: X) -> X:
    """Hidden states before the final norm -> logits (..., V)."""
    x = hidden if spec.embedding_size else norm(ops, spec, weights, "final_norm", hidden)
    logits = ops.logits(weight, x, weights.biases.get("head"))
    if spec.logit_multiplier != 1.0:
        logits = ops.scale(logits, spec.logit_multiplier)
    return logits if spec.logit_cap is None else ops.soft_cap(logits, spec.logit_cap)


def _added(
    ops: Ops[X], spec: ModelSpec, weights: Weights, slot: str, post_norm: str, inner: X, x: X, factor: float = 1.0
) -> X:
    """A block's last linear, of which every process has a part, on the residual stream: (..., hidden)."""
    linear = weights.linear(slot)
    out = ops.sum_parts(ops.linear(linear.weight, inner), linear.bias)
    return _to_residual(ops, spec, weights, post_norm, scaled(ops, out, factor), x)


def with_features(ops: Ops[X], spec: ModelSpec, weights: Weights, x: X, own: X) -> X:
    """The residual stream, with what a layer makes of its own features (`kbit.models.per_layer`): x (..., hidden), own
    (..., f) -> (..., hidden)."""
    gate = ops.linear(weights.matrices["layer_gate"], x)
    made = ops.linear(weights.matrices["layer_up"], ops.activate(gate, own, spec.activation))
    return _to_residual(ops, spec, weights, "layer_post_norm", made, x)


def _to_residual(ops: Ops[X], spec: ModelSpec, weights: Weights, post_norm: str, out: X, x: X) -> X:
    """What a block adds, normalised and scaled where the model does so, on the residual stream: (..., hidden)."""
    out = norm(ops, spec, weights, post_norm, out)
    return ops.add(x, out if spec.residual_multiplier == 1.0 else ops.scale(out, spec.residual_multiplier))
