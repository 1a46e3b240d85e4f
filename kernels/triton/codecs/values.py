"""A chunk of a weight as values, whichever codec it is in: what products multiply with."""

from __future__ import annotations

import triton
import triton.language as tl

from kbit.kernels.triton.codecs.codes import decode, load_planes
from kbit.kernels.triton.codecs.nested import load_nested


@triton.jit
def load_values(
    planes, tile, chunk, padded_columns, values, magic, BITS: tl.constexpr, KIND: tl.constexpr, COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Values (W, 32, COLUMNS / 16, k8, n8, k0) of type DTYPE, before scale and multiplier.

    Args:
        planes: pointers to the planes, three (`codes.load_planes`) or, of a nested weight, as many as it has.
        tile: int32 (W,), row tiles.
        chunk: int32, scalar or (W,), which COLUMNS columns.
        padded_columns: K'.
        values: `codes.load_table`.
        magic: see `codes.decode`.
    """
    if KIND == "nested" or KIND == "nested-pairs":
        out = load_nested(planes, tile, chunk, padded_columns, values, BITS, KIND, COLUMNS, DTYPE)
    else:
        a, b, c = load_planes(planes[0], planes[1], planes[2], tile, chunk, padded_columns, BITS, COLUMNS)
        out = decode(a, b, c, values, magic, BITS, KIND, COLUMNS // 16, DTYPE)
    return out
