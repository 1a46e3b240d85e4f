"""What is added to scores by distance."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kbit.models.distances import by_slope, slopes


@pytest.mark.parametrize("heads", [1, 2, 6, 8, 12, 71, 112])
def test_slopes_are_those_of_transformers(heads: int) -> None:
    modeling = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    theirs = modeling.build_alibi_tensor(torch.ones(1, 3), heads, torch.float32)[:, 0, 1]
    assert np.allclose(slopes(heads), theirs.numpy(), rtol=1e-6)


def test_scores_fall_with_the_distance() -> None:
    table = by_slope(4, 3).reshape(4, 7)
    assert np.array_equal(table[:, 3], np.zeros(4))
    assert np.allclose(table[:, 2], -slopes(4))
    assert np.allclose(table[:, 0], 3 * table[:, 2])
