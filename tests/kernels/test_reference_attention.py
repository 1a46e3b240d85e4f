"""Rotations and attention of the reference against torch.nn.functional and against themselves in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from reference_cases import EPS, assert_within, attention_bound, randn, sdpa

from kbit.kernels import reference, reference_attention


@pytest.mark.parametrize(("dim", "rotated"), [(2, 2), (10, 10), (64, 64), (10, 4)])
def test_rope_is_a_rotation_in_the_plane(dim: int, rotated: int) -> None:
    x, angles = randn(2, 3, 5, dim), randn(2, 3, rotated // 2, seed=1) * 3
    turned = reference.rope(x, angles.cos(), angles.sin())
    half = rotated // 2
    plane = torch.complex(x[..., :half].double(), x[..., half:rotated].double())
    plane = plane * torch.polar(torch.ones_like(angles.double()), angles.double())[:, :, None]
    exact = torch.cat([plane.real, plane.imag, x[..., rotated:].double()], dim=-1)
    assert_within(turned, exact, 4 * EPS * (x.abs().max() + 1) * 2)
    assert torch.equal(turned[..., rotated:], x[..., rotated:])
    assert torch.equal(reference.rope(x, torch.ones(2, 3, half), torch.zeros(2, 3, half)), x)


def test_rope_scores_depend_on_distance_only() -> None:
    q, k = randn(1, 1, 1, 16), randn(1, 1, 1, 16, seed=1)
    frequencies = 100.0 ** (-torch.arange(8) / 8)

    def score(at: int, other: int) -> float:
        a, b = at * frequencies[None, None], other * frequencies[None, None]
        return float((reference.rope(q, a.cos(), a.sin()) * reference.rope(k, b.cos(), b.sin())).sum())

    assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-4)
    assert abs(score(9, 4) - score(9, 5)) > 1e-2


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(1, 1, 1), (6, 2, 8), (5, 5, 7), (4, 1, 16)])
@pytest.mark.parametrize("scratch", [1, 3000, 64 << 20])
def test_attend(
    heads: int, kv_heads: int, dim: int, window: int | None, scratch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ragged rows, padding, leftovers in the cache, odd sizes, any piece size."""
    monkeypatch.setattr(reference_attention, "SCRATCH_BYTES", scratch)
    q, k, v = randn(3, 9, heads, dim), randn(3, kv_heads, 21, dim, seed=1), randn(3, kv_heads, 21, dim, seed=2)
    starts, new = torch.tensor([12, 0, 5]), torch.tensor([9, 4, 0])
    positions, kv_lengths = starts[:, None] + torch.arange(9), starts + new
    exact = sdpa(q, k, v, positions, kv_lengths, dim**-0.5, window)
    for row in range(3):  # what lies beyond a row's length must not matter
        k[row, :, kv_lengths[row] :] = math.nan
        v[row, :, kv_lengths[row] :] = math.inf
    ours = reference.attend(q, k, v, positions, kv_lengths, dim**-0.5, window)
    assert_within(ours, exact, attention_bound(q, k.nan_to_num(0), v.nan_to_num(0, 0, 0), dim**-0.5))


@pytest.mark.parametrize("scratch", [4 * 6 * 16, 4 * 6 * 16 * 5, 64 << 20])
def test_attend_with_equal_rows(scratch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of one length run together, split where the scratch is small; torch's own causal mask as the measure."""
    monkeypatch.setattr(reference_attention, "SCRATCH_BYTES", scratch)
    q, k, v = randn(4, 16, 6, 8), randn(4, 3, 16, 8, seed=1), randn(4, 3, 16, 8, seed=2)
    exact = F.scaled_dot_product_attention(
        q.double().transpose(1, 2), k.double(), v.double(), is_causal=True, enable_gqa=True
    ).transpose(1, 2)
    positions, lengths = torch.arange(16).expand(4, 16), torch.full((4,), 16)
    assert_within(reference.attend(q, k, v, positions, lengths, 8**-0.5), exact, attention_bound(q, k, v, 8**-0.5))


def test_attend_with_capped_scores() -> None:
    """Against the formula: the cap comes after the scale and before the mask."""
    q, k, v = (
        torch.randn(1, *shape, 8, generator=torch.Generator().manual_seed(3)) for shape in ((5, 2), (2, 5), (2, 5))
    )
    found = reference.attend(q, k, v, torch.arange(5)[None], torch.tensor([5]), 0.7, window=3, cap=1.5)
    scores = 1.5 * torch.tanh(0.7 * torch.einsum("bthd,bhsd->bhts", q, k) / 1.5)
    behind = torch.arange(5)[:, None] - torch.arange(5)
    weights = scores.masked_fill((behind < 0) | (behind >= 3), -torch.inf).softmax(-1)
    expected = torch.einsum("bhts,bhsd->bthd", weights, v)
    assert float((found - expected).abs().max()) < 16 * 2**-24 * float(v.abs().max())


@pytest.mark.parametrize("sink", [0.3, -200.0, 200.0])
def test_attend_with_sinks(sink: float) -> None:
    """A score more in every softmax, whose share is lost: far below all others nothing, far above them everything."""
    generator = torch.Generator().manual_seed(8)
    q, k, v = (torch.randn(1, *shape, 4, generator=generator) for shape in ((5, 4), (2, 5), (2, 5)))
    sinks = sink + torch.arange(4.0) * 0.1
    found = reference.attend(q, k, v, torch.arange(5)[None], torch.tensor([5]), 0.7, window=3, sinks=sinks)
    for head in range(4):
        scores = 0.7 * q[0, :, head].double() @ k[0, head // 2].double().T
        behind = torch.arange(5)[:, None] - torch.arange(5)
        scores = scores.masked_fill((behind < 0) | (behind >= 3), -torch.inf)
        beside = torch.cat([scores, sinks[head].double().expand(5, 1)], dim=1)
        wanted = torch.softmax(beside, dim=1)[:, :5] @ v[0, head // 2].double()
        assert torch.allclose(found[0, :, head].double(), wanted, atol=1e-6)
    plain = reference.attend(q, k, v, torch.arange(5)[None], torch.tensor([5]), 0.7, window=3)
    if sink != 0.3:
        assert torch.allclose(found, plain if sink < 0 else torch.zeros(()), atol=1e-6)


def test_attend_extreme_scores() -> None:
    """Scores of +-10^4 overflow a naive exp; the largest wins outright, ties share, and nothing is NaN."""
    q = torch.tensor([[[[100.0]], [[-100.0]]]])  # (1, 2, 1, 1), both queries see all 3 slots
    k = torch.tensor([[[[100.0], [-100.0], [100.0]]]])
    v = torch.tensor([[[[1.0], [2.0], [4.0]]]])
    out = reference.attend(q, k, v, torch.tensor([[2, 3]]), torch.tensor([3]), 1.0)
    assert out.flatten().tolist() == [2.5, 2.0]
    tiny = reference.attend(q * 0, k * 1e-30, v, torch.tensor([[2, 3]]), torch.tensor([3]), 1.0)
    assert tiny.flatten().tolist() == pytest.approx([7 / 3, 7 / 3])


def test_attend_scratch_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No piece holds more scores than the budget allows (one query of one row excepted)."""
    sizes: list[int] = []
    original = reference_attention._softmax_weighted

    def measured(q: torch.Tensor, k: torch.Tensor, *rest: object) -> torch.Tensor:
        sizes.append(4 * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2])
        return original(q, k, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(reference_attention, "_softmax_weighted", measured)
    monkeypatch.setattr(reference_attention, "SCRATCH_BYTES", 10_000)
    q, kv = randn(5, 50, 4, 8), randn(5, 2, 50, 8)
    reference.attend(q, kv, kv, torch.arange(50).expand(5, 50), torch.full((5,), 50), 1.0)
    assert len(sizes) > 5
    assert max(sizes) <= 10_000


def test_soft_cap() -> None:
    x = torch.tensor([-1e30, -3.0, -1e-3, 0.0, 1e-3, 3.0, 1e30])
    assert torch.allclose(reference.soft_cap(x, 2.0).double(), 2.0 * torch.tanh(x.double() / 2.0), rtol=4e-7, atol=0)


def test_cached_keys_put_the_bias_back() -> None:
    """Keys that are nothing but their bias come out exact, whatever the width; without a bias there are codes alone."""
    angles = torch.rand(1, 7, 16) * 6
    bias = 300 * torch.randn(2, 32)
    k = bias.expand(1, 7, 2, 32)
    for bits in (8, 4, 3, 2):
        assert torch.equal(
            reference.cached_keys(k, angles.cos(), angles.sin(), bits, bias),
            reference.rope(k, angles.cos(), angles.sin()),
        )
        codes = reference.quantize_kv_4 if bits == 4 else lambda x, bits=bits: reference.quantize_kv(x, bits)
        plain = reference.dequantize_kv(*codes(reference.rope(k, angles.cos(), angles.sin())))
        assert torch.equal(reference.cached_keys(k, angles.cos(), angles.sin(), bits), plain)
