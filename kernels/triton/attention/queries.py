"""Queries as the scores need them: scaled, rounded to what the tensor cores multiply, and where keys are codes turned
by their group's Hadamard transform.

Heads of up to 256 features are made ready by the program that attends, and stay in its registers. Of wider heads they
would not fit: `prepared_queries` makes them ready once, and the inner loop reads them again, a part at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kbit.kernels.triton.attention.kv_codes import (
    chunk_count,
    chunk_size,
    chunk_start,
    hadamard_columns,
    part_size,
    scale_group,
)

ROWS = 16  # of a program that prepares


@triton.jit
def load_queries(
    row, keep, scale,
    D: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Query tiles as the scores need them: per chunk of features (float keys) or per slab, after the transform.

    Args:
        row: (M,) pointers to a query's features.
        keep: (M,) which exist.
        scale: multiplies every feature, in fp32, before the one rounding to DTYPE.
        D: features of a head, or of a part of one.
        BITS: of the keys; DTYPE: what the tensor cores multiply.
    """
    tiles = ()
    if BITS == 16:
        for chunk in tl.static_range(chunk_count(D, 2)):
            at = chunk_start(D, 2, chunk) + tl.arange(0, chunk_size(D, 2, chunk_start(D, 2, chunk)))
            x = tl.load(row[:, None] + at[None, :], mask=keep[:, None], other=0.0)
            tiles = tiles + ((x.to(tl.float32) * scale).to(DTYPE),)
    else:
        GROUP: tl.constexpr = scale_group(D)
        for slab in tl.static_range(D // 16):
            at = slab * 16 // GROUP * GROUP + tl.arange(0, GROUP)
            x = tl.load(row[:, None] + at[None, :], mask=keep[:, None], other=0.0)
            signs = hadamard_columns(GROUP, slab * 16 % GROUP, 16).to(x.dtype)
            turned = tl.dot(x, signs, input_precision="ieee")  # products by +1 and -1 are exact
            tiles = tiles + ((turned * (scale * GROUP**-0.5)).to(DTYPE),)
    return tiles


@triton.jit
def load_prepared(row, keep, D: tl.constexpr, BITS: tl.constexpr):
    """The tiles of load_queries, from what prepare_queries_kernel wrote; arguments as there."""
    tiles = ()
    if BITS == 16:
        for chunk in tl.static_range(chunk_count(D, 2)):
            at = chunk_start(D, 2, chunk) + tl.arange(0, chunk_size(D, 2, chunk_start(D, 2, chunk)))
            tiles = tiles + (tl.load(row[:, None] + at[None, :], mask=keep[:, None], other=0.0),)
    else:
        for slab in tl.static_range(D // 16):
            at = slab * 16 + tl.arange(0, 16)
            tiles = tiles + (tl.load(row[:, None] + at[None, :], mask=keep[:, None], other=0.0),)
    return tiles


@triton.jit
def prepare_queries_kernel(
    q_ptr, out_ptr, scale, rows, stride_token,
    H: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Program (row tile, part): M heads of queries, part_size(D) of their features."""
    PART: tl.constexpr = part_size(D)
    row = tl.program_id(0) * M + tl.arange(0, M)
    keep = row < rows
    first = tl.program_id(1) * PART
    place = row.to(tl.int64)
    tiles = load_queries(
        q_ptr + (place // H) * stride_token + (row % H) * D + first, keep, scale, PART, BITS, DTYPE
    )  # fmt: skip
    to = (out_ptr + place * D + first)[:, None]
    if BITS == 16:
        for chunk in tl.static_range(chunk_count(PART, 2)):
            at = chunk_start(PART, 2, chunk) + tl.arange(0, chunk_size(PART, 2, chunk_start(PART, 2, chunk)))
            tl.store(to + at[None, :], tiles[chunk], mask=keep[:, None])
    else:
        for slab in tl.static_range(PART // 16):
            tl.store(to + (slab * 16 + tl.arange(0, 16))[None, :], tiles[slab], mask=keep[:, None])


def prepared_queries(q: torch.Tensor, factor: float, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """Queries for heads of several parts, as load_prepared reads them.

    Args:
        q: (N, H, D) fp16, bf16 or fp32; a token's heads contiguous.
        factor: multiplies every feature.
        bits: of the keys.
        dtype: what the tensor cores multiply.

    Returns:
        (N, H, D) in dtype.
    """
    tokens, heads, dim = q.shape
    out = torch.empty((tokens, heads, dim), dtype=dtype, device=q.device)
    rows = tokens * heads
    if rows:
        prepare_queries_kernel[(triton.cdiv(rows, ROWS), dim // part_size(dim))](
            q,
            out,
            factor,
            rows,
            q.stride(0),
            H=heads,
            D=dim,
            BITS=bits,
            DTYPE=tl.bfloat16 if dtype == torch.bfloat16 else tl.float16,
            M=ROWS,
            num_warps=1,
        )
    return out
