"""Rotary position embedding of heads, by itself. (With a cache, kv_append rotates and stores in one kernel.)

    x (B, T, H, D), cos and sin (B, T, R/2) float32 -> (B, T, H, D)

A program has a few heads of one token, so that few tokens still make many programs; its cosines and sines come from
the L2 cache after the first. The roofline is memory: 2 H D elements a token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def rotary_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    heads,
    stride_token,
    stride_head,
    D: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
):
    """HEADS heads of one token: features i and i + HALF turn, features from 2 HALF on stay."""
    token = tl.program_id(0).to(tl.int64)
    x_ptr += token * stride_token
    out_ptr += token * heads * D
    pair = tl.arange(0, BLOCK)
    turned = pair < HALF
    cos = tl.load(cos_ptr + token * HALF + pair, mask=turned, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + token * HALF + pair, mask=turned, other=0.0).to(tl.float32)[None, :]
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    there = head[:, None] < heads
    mask = there & turned[None, :]
    source = x_ptr + head[:, None] * stride_head + pair[None, :]
    out = out_ptr + head[:, None] * D + pair[None, :]
    first = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
    tl.store(out, (first * cos - second * sin).to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out + HALF, (second * cos + first * sin).to(out_ptr.dtype.element_ty), mask=mask)
    if REST > 0:
        at = 2 * HALF + tl.arange(0, REST)
        mask = there & (at[None, :] < D)
        rest = tl.load(x_ptr + head[:, None] * stride_head + at[None, :], mask=mask, other=0.0)
        tl.store(out_ptr + head[:, None] * D + at[None, :], rest.to(out_ptr.dtype.element_ty), mask=mask)


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor:
    """Turn feature pairs (i, i + R/2) of every head; see kernels.reference.rope.

    Args:
        x: (..., H, D), features contiguous.
        cos: (..., R/2), one row per token, R <= D.
        sin: as cos.
        out_dtype: type of the result, by default that of x.

    Returns:
        (..., H, D).

    Raises:
        ValueError: shapes do not match.
    """
    *tokens, heads, dim = x.shape
    half = cos.shape[-1]
    if list(cos.shape[:-1]) != tokens or cos.shape != sin.shape or 2 * half > dim:
        raise ValueError(f"rotary: cos {tuple(cos.shape)} and sin {tuple(sin.shape)} do not fit x {tuple(x.shape)}")
    flat = x.reshape(-1, heads, dim)
    flat = flat if flat.stride(2) == 1 else flat.contiguous()
    out = torch.empty(x.shape, dtype=out_dtype or x.dtype, device=x.device)
    if x.numel():
        several = min(8, triton.next_power_of_2(heads))
        rotary_kernel[(flat.shape[0], triton.cdiv(heads, several))](
            flat,
            cos.contiguous(),
            sin.contiguous(),
            out,
            heads,
            flat.stride(0),
            flat.stride(1),
            D=dim,
            HALF=half,
            HEADS=several,
            BLOCK=triton.next_power_of_2(max(half, 1)),
            REST=triton.next_power_of_2(dim - 2 * half) if dim > 2 * half else 0,
            num_warps=4,
        )
    return out
