"""What an error costs is the sum of what its rows cost, where rows know nothing of each other."""

from __future__ import annotations

import pytest
import torch

from kbit.calibration.factors import Factors

N, K, SOME = 50, 12, 16


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("measured", [True, False])
def test_rows_add_up(measured: bool, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    half = torch.randn(K, 40, generator=generator)
    outputs = torch.rand(N, generator=generator) + 0.1 if measured else None
    factors = Factors(half @ half.T / 40, outputs, coherence=1.5, weighted=weighted)
    assert factors.rows_apart
    error = torch.randn(N, K, generator=generator)
    whole = factors.divergence(error)
    parts = sum(factors.divergence(error[start : start + SOME], start, N) for start in range(0, N, SOME))
    assert parts == pytest.approx(whole, rel=N * K * 2.0**-24)


def test_rows_that_know_of_each_other() -> None:
    half = torch.randn(N, 80, generator=torch.Generator().manual_seed(2))
    assert not Factors(torch.eye(K), half @ half.T / 80).rows_apart
