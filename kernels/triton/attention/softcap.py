"""Soft cap of logits: cap tanh(x / cap) (Gemma 2).

    x (M, V) fp16, bf16 or fp32 -> (M, V)

Element-wise, memory bound: 2 V elements a row. `tanh` and `soft_cap` are for attention kernels too.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 1024


@triton.jit
def tanh(x):
    """Hyperbolic tangent of fp32 values, within 8 rounding units (5e-7, relative).

    1 - 2 / (exp(2 x) + 1) loses digits near zero, so |x| < 0.2 takes the odd Taylor polynomial, whose first missing
    term is 62/2835 x^8 = 6e-8 of the result there. exp overflows to infinity for large x, which gives 1 as it should.
    """
    square = x * x
    series = x * (1.0 + square * (-0.3333333333 + square * (0.1333333333 + square * -0.0539682540)))
    exact = 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)
    return tl.where(tl.abs(x) < 0.2, series, exact)


@triton.jit
def soft_cap(x, cap):
    """cap tanh(x / cap) of fp32 values."""
    return cap * tanh(x / cap)


@triton.jit
def softcap_kernel(x_ptr, out_ptr, size, cap, BLOCK: tl.constexpr):
    """BLOCK consecutive elements."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, soft_cap(x, cap).to(out_ptr.dtype.element_ty), mask=mask)


def softcap(x: torch.Tensor, cap: float, out_dtype: torch.dtype | None = None) -> torch.Tensor:
    """cap tanh(x / cap), any shape.

    Args:
        x: of any shape.
        cap: what the magnitude of results stays below, positive.
        out_dtype: type of the result, by default that of x.

    Raises:
        ValueError: cap is not positive.
    """
    if not cap > 0:
        raise ValueError(f"soft cap {cap}: it must be positive")
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=out_dtype or x.dtype, device=x.device)
    if x.numel():
        softcap_kernel[(triton.cdiv(x.numel(), _BLOCK),)](x, out, x.numel(), float(cap), BLOCK=_BLOCK, num_warps=4)
    return out
