"""Operations that take every token by itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kbit.backends.reference.weight import dequantized, matrix_of, tensor_of
from kbit.backends.split_norm import norm_of_parts
from kbit.graph.backend import Group
from kbit.graph.experts import Experts, Mixture
from kbit.graph.ops import Attention, LowRank, Place, Vector, Weight
from kbit.graph.states import Recurrence, ShortConvolution, StateSpace
from kbit.kernels import reference, reference_experts


class RowOps:
    """The operations that take every token by itself, on tensors (..., K).

    Args:
        group: the processes that share the model, if several do.
    """

    def __init__(self, group: Group | None = None) -> None:
        self._group = group

    def embed(self, weight: Weight, ids: torch.Tensor) -> torch.Tensor:
        return reference.embed(matrix_of(weight), ids)

    def look_up(self, weight: Weight, of: Place, first: int = 0) -> torch.Tensor:
        raise _without_tokens()

    def given(self, width: int) -> torch.Tensor:
        raise _without_tokens()

    def linear(
        self,
        weight: Weight,
        x: torch.Tensor,
        bias: Vector | None = None,
    ) -> torch.Tensor:
        return reference.linear(x, matrix_of(weight), None if bias is None else tensor_of(bias))

    def sum_parts(self, x: torch.Tensor, bias: Vector | None = None) -> torch.Tensor:
        out = x if self._group is None else self._group.sum(x)
        return out if bias is None else out + tensor_of(bias)

    def add(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y

    def multiply(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x * y

    def scale(self, x: torch.Tensor, factor: float | Vector) -> torch.Tensor:
        return x * (factor if isinstance(factor, float) else tensor_of(factor))

    def columns(self, x: torch.Tensor, first: int, count: int) -> torch.Tensor:
        return x[..., first : first + count]

    def soft_cap(self, x: torch.Tensor, cap: float) -> torch.Tensor:
        return reference.soft_cap(x, cap)

    def rotate(self, x: torch.Tensor, head_dim: int, angles: tuple[int, int]) -> torch.Tensor:
        raise _without_tokens()

    def fit_heads(self, x: torch.Tensor, heads: int, head_dim: int, shared: torch.Tensor | None = None) -> torch.Tensor:
        return reference.fit_heads(x, heads, head_dim, shared)

    def by_heads(self, weight: Weight, x: torch.Tensor, heads: int, first: int, *, backward: bool) -> torch.Tensor:
        return reference.by_heads(x, dequantized(weight), heads, first, backward)

    def linear_group(
        self, weights: Sequence[Weight], x: torch.Tensor, biases: Sequence[Vector | None]
    ) -> tuple[torch.Tensor, ...]:
        return tuple(self.linear(weight, x, bias) for weight, bias in zip(weights, biases, strict=True))

    def norm(self, x: torch.Tensor, weight: Vector, eps: float, groups: int = 1, parts: bool = False) -> torch.Tensor:
        of = tensor_of(weight)
        if parts and self._group is not None:
            return norm_of_parts(x, of, eps, self._group)
        if groups > 1:
            runs = x.view(*x.shape[:-1], groups, -1)
            return reference.rms_norm(runs, of.view(groups, -1), eps).flatten(-2)
        if len(of) == x.shape[-1]:
            return reference.rms_norm(x, of, eps)
        return reference.rms_norm(x.view(*x.shape[:-1], -1, len(of)), of, eps).flatten(-2)

    def layer_norm(self, x: torch.Tensor, weight: Vector, bias: Vector | None, eps: float) -> torch.Tensor:
        return reference.layer_norm(x, tensor_of(weight), None if bias is None else tensor_of(bias), eps)

    def activate(self, gate: torch.Tensor, up: torch.Tensor | None, kind: str) -> torch.Tensor:
        return reference.activate(gate, up, kind)

    def sigmoid_gate(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(gate) * x

    def experts(self, x: torch.Tensor, logits: torch.Tensor, experts: Experts, mixture: Mixture) -> torch.Tensor:
        routing, clamp = mixture.routing, mixture.clamp
        bias = None if experts.selection_bias is None else tensor_of(experts.selection_bias)
        if self._group is not None:  # one choice for all: sums that differ in a last bit may choose others
            logits = self._group.from_first(logits)
        chosen, weights = reference_experts.route(
            logits.reshape(-1, routing.experts),
            bias,
            routing.chosen,
            routing.score,
            routing.normalise,
            routing.scale,
            routing.groups,
            routing.chosen_groups,
            routing.group_score,
            routing.jitter,
        )
        if experts.scales is not None:
            weights = weights * tensor_of(experts.scales)[chosen]

        def compute(expert: int, rows: torch.Tensor) -> torch.Tensor:
            gate = self.linear(experts.gates[expert], rows, experts.gate_biases[expert])
            single = experts.ups[expert] is experts.gates[expert]  # (one product, and one gradient)
            up = gate if single else self.linear(experts.ups[expert], rows, experts.up_biases[expert])
            if clamp is None:
                inner = reference.activate(gate, up, mixture.activation)
            else:
                inner = reference_experts.clamped_gate(gate, up, clamp.alpha, clamp.limit)
            return self.linear(experts.downs[expert], inner, experts.down_biases[expert])

        return reference_experts.mix(x.reshape(-1, x.shape[-1]), chosen, weights, compute, routing.scales_input).view(
            x.shape
        )

    def logits(self, weight: Weight, x: torch.Tensor, bias: Vector | None = None) -> torch.Tensor:
        out = reference.logits(x, matrix_of(weight))
        out = out if bias is None else out + tensor_of(bias)
        return out if self._group is None else self._group.from_first(out)

    def adapt(
        self, x: torch.Tensor, products: Sequence[torch.Tensor], factors: Sequence[Sequence[LowRank | None]]
    ) -> tuple[torch.Tensor, ...]:
        raise _without_tokens()

    def self_attention(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        attention: Attention,
        key_bias: Vector | None = None,
        sinks: Vector | None = None,
        by_distance: Vector | None = None,
    ) -> torch.Tensor:
        raise _without_tokens()

    def store_keys(self, k: torch.Tensor, v: torch.Tensor, attention: Attention) -> None:
        raise _without_tokens()

    def cross_attention(self, q: torch.Tensor, attention: Attention) -> torch.Tensor:
        raise _without_tokens()

    def recur(
        self,
        x: torch.Tensor,
        decay: torch.Tensor,
        write: torch.Tensor,
        log_rates: Vector,
        recurrence: Recurrence,
    ) -> torch.Tensor:
        raise _without_tokens()

    def scan(
        self, x: torch.Tensor, steps: torch.Tensor, log_rates: Vector, skips: Vector, space: StateSpace
    ) -> torch.Tensor:
        raise _without_tokens()

    def short_convolution(
        self, x: torch.Tensor, weight: Vector, convolution: ShortConvolution, bias: Vector | None = None
    ) -> torch.Tensor:
        raise _without_tokens()


def _without_tokens() -> TypeError:
    return TypeError("what depends on tokens needs a step and a cache: this is a pass without tokens (a head)")
