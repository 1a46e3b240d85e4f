"""Routing, held against its definition written another way, and what is defined by words: ties, groups, the bias."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from kbit.graph.experts import Routing
from kbit.host.errors import UnsupportedError
from kbit.kernels.reference_experts import clamped_gate, mix, route


def routed(
    logits: torch.Tensor, bias: torch.Tensor | None = None, **settings: Any
) -> tuple[list[list[int]], torch.Tensor]:
    usual = {"chosen": 2, "score": "softmax", "normalise": False, "scale": 1.0}
    experts, weights = route(logits, bias, **{**usual, **settings})
    return experts.tolist(), weights


@pytest.mark.parametrize(
    ("score", "normalise"), [*product(["softmax", "sigmoid", "softmax_of_chosen"], [False, True])], ids=str
)
def test_scores(score: str, normalise: bool) -> None:
    logits = torch.tensor([[1.0, -2.0, 3.0, 0.5]])
    experts, weights = routed(logits, score=score, normalise=normalise, scale=2.0)
    assert experts == [[0, 2]]
    raised = logits[0, [0, 2]].double().exp()
    wanted = {
        "softmax": raised / logits.double().exp().sum(),
        "sigmoid": raised / (1 + raised),
        "softmax_of_chosen": raised / raised.sum(),
    }[score]
    wanted = 2.0 * (wanted / wanted.sum() if normalise else wanted)
    assert torch.allclose(weights[0].double(), wanted, rtol=1e-6)


def test_of_equals_the_lower_index_is_chosen() -> None:
    logits = torch.zeros(1, 70)
    assert routed(logits, chosen=3)[0] == [[0, 1, 2]]
    logits[0, 40] = 1.0
    assert routed(logits, chosen=3, score="sigmoid")[0] == [[0, 1, 40]]


def test_the_bias_chooses_and_does_not_weigh() -> None:
    logits, bias = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([0.0, 0.0, 5.0])
    experts, weights = routed(logits, bias, score="sigmoid")
    assert experts == [[0, 2]]
    assert torch.allclose(weights, torch.sigmoid(torch.tensor([[2.0, 0.0]])))


def test_a_bias_of_a_softmax_is_added_to_shares() -> None:
    """Of logits 2, 1, 0 the shares are 0.67, 0.24, 0.09: 0.2 brings the last one before the second."""
    logits, bias = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([0.0, 0.0, 0.2])
    experts, weights = routed(logits, bias)
    assert experts == [[0, 2]]
    assert torch.allclose(weights, torch.softmax(logits, -1)[:, [0, 2]])
    assert routed(logits, torch.tensor([0.0, 0.0, 0.1]))[0] == [[0, 1]]


def test_groups_are_ranked_by_their_two_best() -> None:
    """The best expert of all is alone in its group; another group has the larger sum, of equals the first."""
    logits = torch.tensor([[3.0, -9.0, -9.0, 1.5, 1.5, -9.0, 1.5, 1.5, 0.0]])
    experts, _ = routed(logits, score="sigmoid", groups=3, chosen_groups=1)
    assert experts == [[3, 4]]
    assert routed(logits, score="sigmoid", groups=3, chosen_groups=3)[0] == [[0, 3]]
    # By their best experts alone it is the first group.
    assert routed(logits, groups=3, chosen_groups=1, group_score="best")[0] == [[0, 1]]


def test_mixing_is_a_weighted_sum() -> None:
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    chosen, weights = torch.tensor([[0, 2], [1, 2], [0, 1], [0, 2], [1, 2]]), torch.rand(5, 2)
    found = mix(x, chosen, weights, lambda expert, rows: (expert + 1.0) * rows)
    factors = (weights * (chosen + 1)).sum(1, keepdim=True)
    assert torch.allclose(found, factors * x, rtol=1e-5)


def test_the_clamped_gate() -> None:
    gate, up = torch.tensor([9.0, -9.0, 1.0]), torch.tensor([9.0, -9.0, 0.5])
    held_gate, held_up = torch.tensor([7.0, -9.0, 1.0]), torch.tensor([7.0, -7.0, 0.5])
    wanted = held_gate * torch.sigmoid(1.702 * held_gate) * (held_up + 1)
    assert torch.equal(clamped_gate(gate, up, 1.702, 7.0), wanted)


def test_what_cannot_be() -> None:
    with pytest.raises(UnsupportedError, match="'tanh' is not one of softmax, sigmoid"):
        routed(torch.zeros(1, 4), score="tanh")
    for wrong in ({"chosen": 0}, {"chosen": 5}, {"groups": 3}, {"groups": 4}, {"groups": 2, "chosen": 3}):
        with pytest.raises(ValueError, match="experts"):
            Routing(**{"experts": 4, "chosen": 2, **wrong})


@pytest.mark.parametrize("jitter", [0.01, 0.2, 0.6])
def test_sparsemixer_is_that_of_transformers(jitter: float) -> None:
    """Positive and negative logits, near each other and far apart; experts in ascending order, with their weights."""
    modeling = pytest.importorskip("transformers.models.phimoe.modeling_phimoe")
    logits = torch.randn(300, 7, generator=torch.Generator().manual_seed(2)) * torch.logspace(-2, 1, 300)[:, None]
    logits[::3] -= 2
    theirs, chosen = modeling.sparsemixer(logits, jitter, training=False)
    experts, weights = route(logits, None, 2, "sparsemixer", False, 2.0, jitter=jitter)
    order = chosen.argsort(1)
    assert torch.equal(experts, chosen.gather(1, order))
    assert torch.allclose(weights, 2.0 * theirs.gather(1, order), rtol=1e-6)
    assert bool((weights < 2.0).any())


def test_scaled_input_is_not_scaled_output() -> None:
    x, experts = torch.tensor([[1.0, -2.0], [3.0, 0.5]]), torch.tensor([[0, 1], [1, 2]])
    weights = torch.tensor([[0.5, 0.25], [1.0, 2.0]])
    found = mix(x, experts, weights, lambda expert, rows: (expert + 1) * rows.square(), scales_input=True)
    wanted = torch.stack([x[0] ** 2 * (0.25 + 2 * 0.0625), x[1] ** 2 * (2 * 1.0 + 3 * 4.0)])
    assert torch.equal(found, wanted)


def test_sparsemixer_chooses_two() -> None:
    with pytest.raises(ValueError, match="sparsemixer chooses 2 of all experts, not 3 of 1 groups"):
        Routing(5, 3, "sparsemixer")
