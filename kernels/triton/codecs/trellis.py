"""Trellis codes on a GPU: from a tile's words to levels, and the rotation of tokens (kbit/formats/trellis.py).

A prepared matrix has its rings as words of 16 bits, int16 (N / 16, K / 16, 16 w) at width w, the earliest bits the
most significant. A window spans at most two words; both are loaded for each weight (neighbouring lanes read the same
ones, so the cache serves all but one), joined, shifted and multiplied, and the product's bytes are summed. Levels are
small integers: exact in half precision and rounded once in bfloat16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def trellis_levels(words_ptr, tile, first, row_tiles, BITS: tl.constexpr, HALF: tl.constexpr, CODE: tl.constexpr,
                   WINDOW: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """Levels of 16 rows and COLUMNS columns, int32 (16, COLUMNS).

    Args:
        words_ptr: int16 words of a matrix.
        tile: row tile.
        first: first column tile; those from row_tiles on (of which there are so many in a row) read the last one's.
        HALF: 1 where every second column has a bit more; rows are half a word longer then.
    """
    row = tl.arange(0, 16)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    count = column % 16 + 1
    end = count * BITS + HALF * (count // 2 + 8 * row)  # of the window, in bits from word row * BITS
    word = (end - 1) // 16
    here = row * BITS + word
    words = 16 * BITS + 8 * HALF
    before = (here + words - 1) % words
    tiles = tl.minimum(first + column // 16, row_tiles - 1)
    base = words_ptr + (tile * row_tiles + tiles).to(tl.int64) * words
    joined = (tl.load(base + before).to(tl.int32) << 16) | (tl.load(base + here).to(tl.int32) & 0xFFFF)
    window = (joined >> (16 * (word + 1) - end)) & ((1 << WINDOW) - 1)
    if CODE == "int":
        return window - (1 << (BITS - 1))
    if CODE == "sum4":
        x = window * -2082680531  # 0x83dcd12d
        return (x & 255) + ((x >> 8) & 255) + ((x >> 16) & 255) + ((x >> 24) & 255) - 510
    x = window * 47157
    return (x & 255) + ((x >> 8) & 255) - 255


@triton.jit
def sums_and_differences(v, SIZE: tl.constexpr, HALF: tl.constexpr):
    """Of the halves of each 2 HALF of SIZE numbers."""
    a, b = tl.split(tl.permute(tl.reshape(v, (SIZE // (2 * HALF), 2, HALF)), (0, 2, 1)))
    return tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), (SIZE,))


@triton.jit
def rotate_kernel(
    x_ptr, out_ptr, rotation_ptr, columns, stride_x, stride_out, MIXED: tl.constexpr, STAGES: tl.constexpr
):
    """x times `rotation`, then the Hadamard transform of MIXED = 2^STAGES columns. Grid (M, K' / MIXED)."""
    at = tl.program_id(1) * MIXED + tl.arange(0, MIXED)
    x = tl.load(x_ptr + tl.program_id(0) * stride_x + at, mask=at < columns, other=0.0).to(tl.float32)
    v = x * tl.load(rotation_ptr + at)
    for stage in tl.static_range(STAGES):
        v = sums_and_differences(v, MIXED, 1 << stage)
    tl.store(out_ptr + tl.program_id(0) * stride_out + at, v.to(out_ptr.dtype.element_ty))


def rotate_tokens(x: torch.Tensor, rotation: torch.Tensor, mixed: int) -> torch.Tensor:
    """Tokens as a trellis's rotated columns want them.

    Args:
        x: (M, K), contiguous rows.
        rotation: float32 (K',), K' = K in whole tiles of 16: a sign / sqrt(mixed).
        mixed: columns that one Hadamard matrix mixes, a power of two that divides K'.

    Returns:
        (M, K'), x's dtype.
    """
    out = torch.empty((x.shape[0], len(rotation)), dtype=x.dtype, device=x.device)
    rotate_kernel[(x.shape[0], len(rotation) // mixed)](
        x, out, rotation, x.shape[1], x.stride(0), out.stride(0), MIXED=mixed, STAGES=mixed.bit_length() - 1,
        num_warps=1 if mixed <= 128 else 4,
    )  # fmt: skip
    return out
