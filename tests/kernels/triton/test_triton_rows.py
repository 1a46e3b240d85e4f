"""Kernels that take every row by itself, against kernels/reference.py: norms, activations, soft cap, rotary."""

from __future__ import annotations

import pytest
import torch
from triton_cases import DTYPES, FP32_UNIT, assert_within, rounded, unit

from kbit.kernels import reference

pytest.importorskip("triton")
from kbit.kernels.triton.attention.rotary import rotary
from kbit.kernels.triton.attention.softcap import softcap
from kbit.kernels.triton.rows.activate import KINDS, activate
from kbit.kernels.triton.rows.norm import WHOLE_ROW, layer_norm, rms_norm

EPS = 1e-5
# Rows and features: one, odd, a power of two, one more than that, and a row that does not stay in registers.
SHAPES = [(1, 1), (3, 37), (2, 576), (5, 1025), (2, WHOLE_ROW + 3)]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def norm_bound(expected: torch.Tensor, columns: int, dtype: torch.dtype) -> torch.Tensor:
    # A mean of K squares is within K u (relative), its root within half of that; a handful of roundings follow.
    return expected.abs() * (columns / 2 + 8) * FP32_UNIT + rounded(expected, dtype) * (1 + unit(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm(shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    x, weight = normal(*shape, dtype=dtype), normal(shape[1], seed=1, dtype=dtype)
    out, same = rms_norm(x.to(device), weight.to(device), EPS)
    assert out.dtype == dtype
    assert torch.equal(same.cpu(), x)
    expected = reference.rms_norm(x, weight, EPS)
    assert_within(out, expected, norm_bound(expected, shape[1], dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm_of_a_sum(shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    """The sum is rounded as torch rounds it, bit for bit, and the norm is that of the rounded sum."""
    x, residual, weight = normal(*shape, dtype=dtype), normal(*shape, seed=2, dtype=dtype), normal(shape[1], seed=1)
    out, summed = rms_norm(x.to(device), weight.to(device), EPS, residual.to(device), out_dtype=torch.float32)
    assert torch.equal(summed.cpu(), x + residual)
    expected = reference.rms_norm(x + residual, weight, EPS)
    assert_within(out, expected, norm_bound(expected, shape[1], torch.float32))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layer_norm(shape: tuple[int, int], dtype: torch.dtype, bias: bool, device: str) -> None:
    x, weight = normal(*shape, dtype=dtype) + 3, normal(shape[1], seed=1, dtype=dtype)
    shift = normal(shape[1], seed=2, dtype=dtype) if bias else None
    out, _ = layer_norm(x.to(device), weight.to(device), None if shift is None else shift.to(device), EPS)
    assert out.dtype == dtype
    expected = torch.nn.functional.layer_norm(
        x.double(), shape[1:], weight.double(), None if shift is None else shift.double(), EPS
    ).float()
    # The mean is within K u of mean|x|; divided by the deviation that moves every result by as much.
    deviation = (x.double().var(-1, unbiased=False, keepdim=True) + EPS).sqrt().float()
    moved = weight.float().abs() * (shape[1] + 8) * FP32_UNIT * (x.float().abs().mean(-1, keepdim=True) / deviation + 1)
    assert_within(out, expected, 2 * moved + norm_bound(expected.abs() + 1, shape[1], dtype))


def test_layer_norm_of_a_sum(device: str) -> None:
    x, residual, weight = normal(3, 70).half(), normal(3, 70, seed=1).half(), normal(70, seed=2)
    out, summed = layer_norm(x.to(device), weight.to(device), None, EPS, residual.to(device), torch.float32)
    assert torch.equal(summed.cpu(), x + residual)
    expected = torch.nn.functional.layer_norm((x + residual).float(), (70,), weight, None, EPS)
    assert_within(out, expected, 1e-5)


def test_norm_of_zeros_and_empty(device: str) -> None:
    out, _ = rms_norm(torch.zeros(2, 5, device=device), torch.ones(5, device=device), EPS)
    assert torch.equal(out.cpu(), torch.zeros(2, 5))
    assert rms_norm(torch.zeros(0, 5, device=device), torch.ones(5, device=device), EPS)[0].shape == (0, 5)


def test_norm_of_strided_rows(device: str) -> None:
    """A slice of a wider matrix is read in place."""
    wide = normal(4, 96)
    out, _ = rms_norm(wide.to(device)[:, 32:64], torch.ones(32, device=device), EPS)
    expected = reference.rms_norm(wide[:, 32:64], torch.ones(32), EPS)
    assert_within(out, expected, norm_bound(expected, 32, torch.float32))


def test_norm_refuses_other_shapes(device: str) -> None:
    x = torch.zeros(2, 8, device=device)
    with pytest.raises(ValueError, match=r"weight \(4,\) does not fit rows of 8"):
        rms_norm(x, torch.ones(4, device=device), EPS)
    with pytest.raises(ValueError, match=r"residual \(1, 8\) is not \(2, 8\)"):
        rms_norm(x, torch.ones(8, device=device), EPS, x[:1])


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_activate(kind: str, dtype: torch.dtype, gated: bool, device: str) -> None:
    gate = (3 * normal(3, 1030)).to(dtype)
    gate[0, :4] = torch.tensor([0.0, -0.0, 60.0, -60.0])
    up = normal(3, 1030, seed=1, dtype=dtype) if gated else None
    out = activate(gate.to(device), None if up is None else up.to(device), kind)
    assert out.dtype == dtype
    expected = reference.activate(gate, up, kind)
    # Sigmoid and the normal distribution function are within about 4 u of 1, so errors are relative to |gate up|.
    size = gate.float().abs() * (1 if up is None else up.float().abs())
    assert_within(out, expected, 16 * FP32_UNIT * (size + expected.abs()) + 2 * rounded(expected, dtype))


def test_activate_halves_of_one_matrix(device: str) -> None:
    both = normal(5, 2 * 48, dtype=torch.float16)
    on_device = both.to(device)
    out = activate(on_device[:, :48], on_device[:, 48:], "silu", out_dtype=torch.float32)
    expected = reference.activate(both[:, :48], both[:, 48:], "silu")
    assert_within(out, expected, 1e-5)


def test_activate_refuses_unknown_kinds(device: str) -> None:
    with pytest.raises(ValueError, match="'swish' is not one of silu, gelu, gelu_tanh, relu"):
        activate(torch.zeros(1, 1, device=device), None, "swish")
    with pytest.raises(ValueError, match="up"):
        activate(torch.zeros(1, 2, device=device), torch.zeros(1, 3, device=device), "silu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softcap(dtype: torch.dtype, device: str) -> None:
    """Relative errors: small logits keep their digits."""
    x = torch.cat([normal(2000) * 10.0 ** normal(2000, seed=1), torch.tensor([0.0, 1e4, -1e4, 6.0, 5.9])]).to(dtype)
    out = softcap(x.to(device), 30.0)
    expected = 30.0 * torch.tanh(x.double() / 30.0)
    assert_within(out, expected, 8 * FP32_UNIT * expected.abs() + 2 * rounded(expected, dtype))
    with pytest.raises(ValueError, match="positive"):
        softcap(x, 0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "dim", "half"), [(1, 2, 1), (3, 64, 32), (9, 80, 40), (12, 96, 16), (2, 10, 3)])
def test_rotary(heads: int, dim: int, half: int, dtype: torch.dtype, device: str) -> None:
    x = normal(2, 5, heads, dim, dtype=dtype)
    angles = 100 * normal(2, 5, half, seed=1)
    out = rotary(x.to(device), angles.cos().to(device), angles.sin().to(device))
    assert out.dtype == dtype
    expected = reference.rope(x, angles.cos(), angles.sin())
    # A difference of two products is within 3 u of the sum of their magnitudes, whether the last one is fused or not.
    size = reference.rope(x.abs(), angles.cos().abs(), angles.sin().abs()).abs() + expected.abs()
    size[..., :half] = (x[..., :half] * angles.cos()[:, :, None]).abs().float() + (
        x[..., half : 2 * half] * angles.sin()[:, :, None]
    ).abs().float()
    assert_within(out, expected, 4 * FP32_UNIT * size + 2 * rounded(expected, dtype))


def test_rotary_refuses_other_shapes(device: str) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        rotary(torch.zeros(1, 2, 4, 8, device=device), torch.ones(1, 3, 4, device=device), torch.ones(1, 3, 4))
