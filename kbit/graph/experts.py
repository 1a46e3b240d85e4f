"""Mixtures of experts: which experts a token goes to and what they compute, as data.

A router gives every expert a logit. Some experts are chosen for each token; each of them computes down(act(gate(x)) *
up(x)), and the results are added up by their weights. `kbit.kernels.reference_experts` says what it means.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from kbit.graph.ops import Vector, Weight

Score = Literal["softmax", "sigmoid", "softmax_of_chosen", "sparsemixer"]


@dataclass(frozen=True)
class Routing:
    """How experts are chosen and weighed.

    Attributes:
        experts: E.
        chosen: experts of each token, at most E. Of equals the one of lower index is chosen.
        score: what becomes of a logit. "softmax": over all experts. "sigmoid": each by itself. "softmax_of_chosen":
            experts are chosen by their logits, and the softmax is over those chosen. "sparsemixer" (arXiv 2409.12136):
            two, one after the other, each the best of those left, and weighed by the softmax over those left that come
            near it: whose logits l lie below its m by at most 2 jitter max(|l|, m).
        normalise: the chosen experts' scores are divided by their sum.
        scale: multiplies them in the end.
        groups: experts are in so many groups of consecutive ones.
        chosen_groups: only so many groups take part for a token, those with the largest
        group_score: "two best": the sum of a group's two best experts; "best": its best one.
        jitter: of "sparsemixer".
        scales_input: what an expert weighs multiplies what goes into it, not what comes out (Llama 4).
    """

    experts: int
    chosen: int
    score: Score = "softmax"
    normalise: bool = False
    scale: float = 1.0
    groups: int = 1
    chosen_groups: int = 1
    group_score: Literal["two best", "best"] = "two best"
    jitter: float = 0.0
    scales_input: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.chosen <= self.experts:
            raise ValueError(f"{self.chosen} of {self.experts} experts cannot be chosen")
        if self.score == "sparsemixer" and (self.chosen != 2 or self.groups != 1):
            raise ValueError(f"sparsemixer chooses 2 of all experts, not {self.chosen} of {self.groups} groups")
        size = self.experts // max(1, self.groups)
        if self.groups < 1 or self.experts % self.groups or not 1 <= self.chosen_groups <= self.groups:
            raise ValueError(f"{self.experts} experts are not {self.groups} groups of which {self.chosen_groups} count")
        if self.groups > 1 and (size < 2 or self.chosen > self.chosen_groups * size):
            raise ValueError(f"{self.chosen} experts are more than {self.chosen_groups} groups of {size} have")


@dataclass(frozen=True)
class Clamp:
    """gpt-oss's gate: with gate g at most `limit` and up u within it, g sigmoid(alpha g) (u + 1)."""

    alpha: float
    limit: float


@dataclass(frozen=True)
class Mixture:
    """What a layer's experts compute.

    Attributes:
        routing: who is chosen.
        activation: one of kernels.activations.ACTIVATIONS, of gates.
        clamp: in place of the activation, where there is one.
    """

    routing: Routing
    activation: str = "silu"
    clamp: Clamp | None = None


@dataclass(frozen=True, eq=False)
class Experts:
    """The parameters of a layer's experts, prepared by one backend: E each. I features are inside an expert.

    Attributes:
        gates, ups: matrices (I, K).
        downs: matrices (K, I).
        gate_biases, up_biases: (I,) each, or None.
        down_biases: (K,) each, or None.
        selection_bias: (E,), added to scores where experts are chosen, and not where they are weighed; or None.
        scales: (E,), multiply what the chosen experts weigh in the end; or None.
    """

    gates: tuple[Weight, ...]
    ups: tuple[Weight, ...]
    downs: tuple[Weight, ...]
    gate_biases: tuple[Vector | None, ...]
    up_biases: tuple[Vector | None, ...]
    down_biases: tuple[Vector | None, ...]
    selection_bias: Vector | None = None
    scales: Vector | None = None
