"""RMSNorm and LayerNorm of rows, with an optional sum with a residual before.

    x (M, K) fp16, bf16 or fp32 -> (M, K)        weight (K,), bias (K,)

One program has one row. A row of up to 16384 features stays in registers: it is read once and written once, which is
also the roofline it aims at (memory: 2 K elements a row, 4 K with a residual). Longer rows are read twice or three
times, from the L2 cache after the first. Sums are fp32; the variance of LayerNorm is taken around the mean in a pass of
its own, since mean(x^2) - mean(x)^2 loses all digits where the mean is large.

With a residual the sum x + residual is rounded to its type, stored, and normalised as stored: the next layer's residual
and this norm see the same values.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kbit.kernels.triton.rows.rows import as_rows

# Features a row may have to stay in registers: 16 warps hold 32 fp32 values a thread of it, which leaves room for the
# weight and the sums in the 128 registers that two such programs on a multiprocessor may use.
WHOLE_ROW = 16384
_CHUNK = 4096


@triton.jit
def _row(x_ptr, residual_ptr, sum_ptr, at, mask, RESIDUAL: tl.constexpr, STORE: tl.constexpr):
    """Values to normalise, fp32; with a residual the rounded sum, stored the first time it is formed."""
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if RESIDUAL:
        x = x + tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
        stored = x.to(sum_ptr.dtype.element_ty)
        if STORE:
            tl.store(sum_ptr + at, stored, mask=mask)
        x = stored.to(tl.float32)
    return x


@triton.jit
def norm_kernel(
    x_ptr,
    residual_ptr,
    sum_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    columns,
    stride_x,
    stride_residual,
    eps,
    CENTERED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BIAS: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: w (x - mean) / sqrt(mean((x - mean)^2) + eps) + b, the mean and b only for LayerNorm."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_x
    residual_ptr += row * stride_residual
    sum_ptr += row * columns
    out_ptr += row * columns
    lane = tl.arange(0, BLOCK)
    mean = 0.0
    if WHOLE:
        mask = lane < columns
        x = _row(x_ptr, residual_ptr, sum_ptr, lane, mask, RESIDUAL, True)
        if CENTERED:
            mean = tl.sum(x, axis=0) / columns
            x = tl.where(mask, x - mean, 0.0)
        rate = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / columns + eps)
        out = x * rate * tl.load(weight_ptr + lane, mask=mask, other=0.0).to(tl.float32)
        if BIAS:
            out += tl.load(bias_ptr + lane, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + lane, out.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(0, columns, BLOCK):
            at = start + lane
            mask = at < columns
            x = _row(x_ptr, residual_ptr, sum_ptr, at, mask, RESIDUAL, True)
            total += x if CENTERED else x * x
        if CENTERED:
            mean = tl.sum(total, axis=0) / columns
            total = tl.zeros((BLOCK,), dtype=tl.float32)
            for start in range(0, columns, BLOCK):
                at = start + lane
                mask = at < columns
                x = _row(x_ptr, residual_ptr, sum_ptr, at, mask, RESIDUAL, False)
                x = tl.where(mask, x - mean, 0.0)
                total += x * x
        rate = 1.0 / tl.sqrt(tl.sum(total, axis=0) / columns + eps)
        for start in range(0, columns, BLOCK):
            at = start + lane
            mask = at < columns
            x = _row(x_ptr, residual_ptr, sum_ptr, at, mask, RESIDUAL, False) - mean
            out = x * rate * tl.load(weight_ptr + at, mask=mask, other=0.0).to(tl.float32)
            if BIAS:
                out += tl.load(bias_ptr + at, mask=mask, other=0.0).to(tl.float32)
            tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=mask)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """w s / sqrt(mean(s^2) + eps) of s = x, or of s = x + residual.

    Args:
        x: (..., K), features contiguous.
        weight: (K,).
        eps: added to the mean square.
        residual: like x, or None.
        out_dtype: type of the result, by default that of x.

    Returns:
        The norm (..., K), and s (..., K) in the residual's type (x itself without a residual).

    Raises:
        ValueError: shapes do not match.
    """
    return _norm(x, weight, None, eps, residual, out_dtype, centered=False)


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """w (s - mean) / sqrt(var(s) + eps) + b of s = x, or of s = x + residual; var divides by K.

    Args:
        x: (..., K), features contiguous.
        weight: (K,).
        bias: (K,) or None.
        eps: added to the variance.
        residual: like x, or None.
        out_dtype: type of the result, by default that of x.

    Returns:
        As rms_norm.

    Raises:
        ValueError: shapes do not match.
    """
    return _norm(x, weight, bias, eps, residual, out_dtype, centered=True)


def _norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
    out_dtype: torch.dtype | None,
    *,
    centered: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    columns = x.shape[-1]
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None and (vector.shape != (columns,) or not vector.is_contiguous()):
            raise ValueError(f"norm: {name} {tuple(vector.shape)} does not fit rows of {columns} features, contiguous")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"norm: residual {tuple(residual.shape)} is not {tuple(x.shape)}")
    rows = as_rows(x)
    others = rows if residual is None else as_rows(residual)
    out = torch.empty(x.shape, dtype=out_dtype or x.dtype, device=x.device)
    summed = x if residual is None else torch.empty(x.shape, dtype=residual.dtype, device=x.device)
    if x.numel() == 0:
        return out, summed
    whole = columns <= WHOLE_ROW
    block = triton.next_power_of_2(columns) if whole else _CHUNK
    norm_kernel[(rows.shape[0],)](
        rows,
        others,
        summed,
        weight,
        weight if bias is None else bias,
        out,
        columns,
        rows.stride(0),
        others.stride(0),
        eps,
        CENTERED=centered,
        RESIDUAL=residual is not None,
        BIAS=bias is not None,
        WHOLE=whole,
        BLOCK=block,
        num_warps=min(16, max(1, block // 512)),
    )
    return out, summed
