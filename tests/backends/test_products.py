"""Float32 products of whatever layout against float64."""

from __future__ import annotations

import pytest
import torch

from kbit.backends.reference.products import product, product_with_rows

SHAPES = [(1, 1, 1), (3, 5, 7), (16, 48, 33), (130, 65, 257), (1, 300, 64), (64, 1, 96)]


def exact(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """a b in float64, and what a sum of K float32 products may be off by, in any order."""
    size = a.double().abs() @ b.double().abs()
    return a.double() @ b.double(), 2 * a.shape[-1] * 2.0**-24 * size + 1e-30


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_all_layouts_give_the_product(m: int, n: int, k: int) -> None:
    generator = torch.Generator().manual_seed(m * n * k)
    wide_a, wide_b = torch.randn(m + 3, k + 2, generator=generator), torch.randn(k + 2, n + 3, generator=generator)
    a, b = wide_a[:m, :k], wide_b[:k, :n]  # gaps between rows
    expected, bound = exact(a, b)
    for left in (a, a.contiguous(), a.T.contiguous().T):
        for right in (b, b.contiguous(), b.T.contiguous().T):
            assert ((product(left, right).double() - expected).abs() <= bound).all()
            assert ((product_with_rows(left, right.T).double() - expected).abs() <= bound).all()


def test_leading_dimensions_and_empty_sums() -> None:
    x, w = torch.randn(2, 3, 40), torch.randn(9, 40)
    assert product_with_rows(x, w).shape == (2, 3, 9)
    torch.testing.assert_close(product_with_rows(x, w), torch.nn.functional.linear(x, w), rtol=1e-4, atol=1e-4)
    assert not product(torch.zeros(4, 0), torch.zeros(0, 5)).any()
    assert product(torch.zeros(4, 0), torch.zeros(0, 5)).shape == (4, 5)
