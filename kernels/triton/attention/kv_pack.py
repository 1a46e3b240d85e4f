"""Codes into the words of pages: what threads that hold a scale group each put together (kv_codes has the layout)."""

from __future__ import annotations

import triton
import triton.language as tl

from kbit.kernels.triton.attention.kv_codes import shifted


@triton.jit
def columns(x):
    """The columns of a tile (R, C), each (R,): a tuple of C, a power of two."""
    ROWS: tl.constexpr = x.shape[0]
    COUNT: tl.constexpr = x.shape[1]
    found = ()
    if COUNT == 1:
        found = (tl.reshape(x, (ROWS,)),)
    else:
        even, odd = tl.split(tl.reshape(x, (ROWS, COUNT // 2, 2)))
        evens, odds = columns(even), columns(odd)
        for i in tl.static_range(COUNT // 2):
            found = found + (evens[i], odds[i])
    return found


@triton.jit
def beside(parts, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """The reverse of `columns` for COUNT of a tuple's tensors from FIRST on: (R, COUNT)."""
    ROWS: tl.constexpr = parts[FIRST].shape[0]
    if COUNT == 1:
        x = tl.reshape(parts[FIRST], (ROWS, 1))
    else:
        low, high = beside(parts, FIRST, COUNT // 2), beside(parts, FIRST + COUNT // 2, COUNT // 2)
        x = tl.reshape(tl.permute(tl.join(low, high), (0, 2, 1)), (ROWS, COUNT))
    return x


@triton.jit
def packed(codes, place, GROUP: tl.constexpr, FROM: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr):
    """Bits [FROM, FROM + WIDTH) of the codes of a chunk's groups as the words of a plane.

    Args:
        codes: tuple of GROUP int32 (R,).
        place: int32 (R,), index of the group in its chunk of GROUPS groups.

    Returns:
        int32 (R / GROUPS, words of a chunk); of one word half may be empty.
    """
    ROWS: tl.constexpr = place.shape[0]
    LANE_BITS: tl.constexpr = GROUP * GROUPS // 16 * WIDTH
    LANES: tl.constexpr = min(32 // LANE_BITS, 16)
    words = ()
    for word in tl.static_range(16 // LANES):
        sum = tl.zeros((ROWS,), tl.int32)
        for lane in tl.static_range(LANES):
            for slab in tl.static_range(GROUP // 16):
                field = codes[slab * 16 + word * LANES + lane] & (((1 << WIDTH) - 1) << FROM)
                sum |= shifted(field, FROM - lane * LANE_BITS - slab * WIDTH)
        words = words + (sum << (place * (GROUP // 16 * WIDTH)),)
    parts = tl.reshape(beside(words, 0, 16 // LANES), (ROWS // GROUPS, GROUPS, 16 // LANES))
    return tl.sum(parts, 1)  # no two have a bit in common


@triton.jit
def store_plane(
    codes, plane, place, keep, group, START: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr, FROM: tl.constexpr,
    WIDTH: tl.constexpr, GROUPS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Put one plane of a run's codes into the pages.

    Args:
        codes: tuple of GROUP int32 (T CHUNKS GROUPS,).
        plane: (T CHUNKS,) pointers to bytes, where the plane begins in the token's page.
        place: (T CHUNKS,) places of the tokens within the page; keep: which tokens there are.
        group: int32 (T CHUNKS GROUPS,), index of the group in its run.
    """
    words = packed(codes, group % GROUPS, GROUP, FROM, WIDTH, GROUPS)
    ROWS: tl.constexpr = words.shape[0]
    BYTES: tl.constexpr = GROUP * GROUPS * WIDTH // 8  # of a chunk
    chunk = tl.arange(0, ROWS) % CHUNKS
    to = plane + (place * (D * WIDTH // 8) + (START * WIDTH // 8 + chunk * BYTES))
    if D * WIDTH % 32 == 0:
        whole = to.to(tl.pointer_type(tl.int32), bitcast=True)
        tl.store(whole[:, None] + tl.arange(0, BYTES // 4)[None, :], words, mask=keep[:, None])
    else:  # a token's bytes are a multiple of two only
        halves = tl.reshape(tl.join(words, words >> 16), (ROWS, 2 * words.shape[1])).to(tl.int16)
        at = tl.arange(0, 2 * words.shape[1])[None, :]
        whole = to.to(tl.pointer_type(tl.int16), bitcast=True)
        tl.store(whole[:, None] + at, halves, mask=keep[:, None] & (at < BYTES // 2))
