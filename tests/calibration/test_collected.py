"""Factors of texts in which a few tokens are most of the Fisher information."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kbit.calibration.collected import Capture, Collected, light_share
from kbit.calibration.factors import Factors

TEXTS, TOKENS, K, N = 16, 256, 24, 16
NAME = "matrix"


def captures(heavy: float) -> list[Capture]:
    """Texts of independent tokens, whose first has another direction, and is `heavy` times as large on both sides."""
    generator = torch.Generator().manual_seed(4)
    found = []
    for _ in range(TEXTS):
        x, d = (torch.randn(TOKENS, size, generator=generator) for size in (K, N))
        x[:, 0] = 0.0
        x[0], d[0] = 0.0, d[0] * torch.eye(N)[3] * heavy
        x[0, 0] = heavy * K**0.5
        capture = Capture({})
        capture.inputs[NAME], capture.gradients[NAME] = x, d
        found.append(capture)
    return found


def collected(pieces: list[Capture], **options: Any) -> Factors:
    total = Collected(**options)
    source: Any = SimpleNamespace(path="model")
    with ThreadPoolExecutor(2) as pool:
        total.add(pieces, pool)
    return total.factors(TEXTS * TOKENS, source)[NAME]


def cost(pieces: list[Capture], error: torch.Tensor) -> float:
    """Of an error, in nats per token: the second moment of what it does to a log-probability."""
    felt = torch.cat([((p.inputs[NAME] @ error.T) * p.gradients[NAME]).sum(dim=1) for p in pieces])
    return 0.5 * float(felt.square().mean())


@pytest.mark.parametrize("heavy", [1.0, 10.0, 100.0])
def test_what_heavy_tokens_do_not_feel_costs_what_the_others_say(heavy: float) -> None:
    pieces = captures(heavy)
    factors = collected(pieces)
    error = torch.randn(N, K, generator=torch.Generator().manual_seed(5))
    error[:, 0] = error[3] = 0.0  # the only feature of the first tokens, and the only output where one feels them
    assert factors.divergence(error) == pytest.approx(cost(pieces, error), rel=0.25)


def test_what_they_feel_is_not_forgotten() -> None:
    """Where outputs of an error point is taken from the other tokens, how strongly it is felt is not."""
    pieces = captures(30.0)
    error = torch.zeros(N, K)
    error[:, 0] = torch.randn(N, generator=torch.Generator().manual_seed(6))
    felt = [cost(pieces, torch.outer(torch.eye(N)[row], torch.eye(K)[0])) for row in range(N)]
    everywhere = sum(felt) / N * float(error.square().sum())
    assert collected(pieces).divergence(error) == pytest.approx(everywhere, rel=0.35)
    assert collected(pieces, cut=1.0).divergence(error) < 0.05 * everywhere


def test_light_tokens_keep_their_weight() -> None:
    weight = torch.arange(1.0, 301.0)[:, None]
    kept = light_share(weight) * weight
    assert torch.equal(kept[:298], weight[:298])
    assert torch.equal(kept[298:], torch.full((2, 1), 298.0))
    assert torch.equal(light_share(torch.zeros(5, 1)), torch.ones(5, 1))
