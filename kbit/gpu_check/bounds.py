"""How far a kernel's result may be from the reference: bounds from rounding units and norms, and the comparison."""

from __future__ import annotations

import torch

FP32_UNIT = 2.0**-24


class TooFarError(AssertionError):
    """A result beyond its bound.

    Attributes:
        worst: the largest error in units of the bound; infinite for a NaN.
    """

    def __init__(self, message: str, worst: float) -> None:
        super().__init__(message)
        self.worst = worst


def unit(dtype: torch.dtype) -> float:
    """Rounding unit: the largest relative error of rounding to nearest. 2^-11, 2^-8 and 2^-24 for fp16, bf16, fp32."""
    return torch.finfo(dtype).eps / 2


def rounded(expected: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Bound on the error of rounding `expected` to dtype once, smallest numbers included."""
    return unit(dtype) * expected.abs().float() + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2


def product_bound(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.dtype,
    operands: torch.dtype = torch.float32,
    *,
    decoded: int = 3,
) -> torch.Tensor:
    """How far x W^T may be from the reference's, element by element: (M, K) and (N, K) -> (M, N).

    A sum of K products in any order is within K u of the sum of magnitudes (Higham, section 3.1), here and in the
    reference; the weights and x carry the rounding of the type that they are multiplied in.

    Args:
        x: as the kernel gets it.
        weight: as the reference has it.
        out: type of the result.
        operands: type of the factors: fp16 or bf16 where tensor cores multiply.
        decoded: roundings of a decoded weight (code to level, times scale, plus offset).
    """
    magnitudes = x.abs().float() @ weight.abs().float().T
    sums = 2 * x.shape[-1] * FP32_UNIT
    factors = decoded * FP32_UNIT + (0 if operands == torch.float32 else 2 * unit(operands))
    error = (sums + factors) * magnitudes
    return error + rounded(x.float() @ weight.float().T, out) * (1 + 2 * unit(out))


def assert_within(got: torch.Tensor, expected: torch.Tensor, bound: torch.Tensor | float) -> float:
    """|got - expected| <= bound everywhere; the largest error in units of the bound.

    Raises:
        TooFarError: it is not, with the worst element in the message.
    """
    if got.shape != expected.shape:
        raise TooFarError(f"{tuple(got.shape)} is not {tuple(expected.shape)}", float("inf"))
    error = (got.double().cpu() - expected.double().cpu()).abs()
    limit = torch.as_tensor(bound, dtype=torch.float64).cpu().expand_as(error)
    if torch.isnan(error).any():
        raise TooFarError(f"{int(torch.isnan(error).sum())} results are NaN", float("inf"))
    if not error.numel():
        return 0.0
    units = error / limit.clamp(min=1e-300)
    wrong = error > limit
    if wrong.any():
        worst = units.flatten().argmax()
        index = tuple(int(i) for i in torch.unravel_index(worst, error.shape))
        raise TooFarError(
            f"{int(wrong.sum())} of {wrong.numel()} are too far off; worst at {index}: {got[index].item()!r} is not "
            f"{expected[index].item()!r} within {limit[index].item():.3g}",
            float(units.max()),
        )
    return float(units.max())


def assert_equal(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The same shape, type and bits; 0.

    Raises:
        TooFarError: they differ.
    """
    got, expected = got.cpu(), expected.cpu()
    if (got.shape, got.dtype) != (expected.shape, expected.dtype):
        raise TooFarError(
            f"{tuple(got.shape)} {got.dtype} is not {tuple(expected.shape)} {expected.dtype}", float("inf")
        )
    ours, theirs = (x.contiguous().view(torch.uint8) if x.numel() else x for x in (got, expected))
    if not torch.equal(ours, theirs):
        raise TooFarError(f"{int((got != expected).sum())} of {got.numel()} differ", float("inf"))
    return 0.0
