"""Embedding lookup from a matrix in the matmul kernels' layout: one copy of a tied embedding serves head and lookup.

    ids (T,), planes int32 (N' / 16, K' w / 256, 32, 4), scales (N' / 16, blocks', 16) -> (T, K)

A program has a run of one row, or of none (a whole matrix is "looked up" to be multiplied by another library, or to be
tested). The layout (see layout.py) spreads a row over 4 of the 32 lanes of every piece, so of each 512 bytes 32 to 64
are this row's: the lookup reads up to 16 times the bytes of its row, which is little beside a layer's weights, and the
head keeps its 128-bit loads. Values are table entries times scales in fp32, rounded once; a table that was rounded to
half precision for the tensor cores gives what the matmul kernels multiply with.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kbit.formats.quant_format import SUPERBLOCK
from kbit.host.errors import UnsupportedError
from kbit.kernels.triton.codecs.layout import TritonWeight

_BLOCK = 1024


@triton.jit
def _fragment_field(
    plane_ptr, row, at, mask, columns, WIDTH: tl.constexpr, WIDEST: tl.constexpr, ADJACENT: tl.constexpr
):
    """Bits of a plane for columns `at` of a row, int32; `columns` is K' (padded)."""
    span: tl.constexpr = 256 // WIDTH  # columns of a piece
    pairs: tl.constexpr = 16 // WIDTH  # pairs of codes in a word
    pieces = columns // span
    lane = row % 8 * 4 + at % 8 // 2
    step = at % span // 16
    pair = (step * 2 + at % 16 // 8) * 2 + row % 16 // 8
    word = ((row // 16 * pieces + at // span) * 32 + lane) * 4 + pair // pairs
    value = tl.load(plane_ptr + word, mask=mask, other=0)
    within = pair % pairs
    whole: tl.constexpr = 16 // WIDEST  # pairs of a word of the widest plane
    place = within % whole * WIDEST + within // whole * WIDTH
    place = 2 * place + at % 2 * WIDTH if ADJACENT else place + at % 2 * 16
    return (value >> place) & ((1 << WIDTH) - 1)


@triton.jit
def _nested_field(plane_ptr, row, at, mask, columns, WIDTH: tl.constexpr):
    """As _fragment_field, of a nested weight's plane of 2 or 1 bits (codecs/nested.py)."""
    span: tl.constexpr = 256 // WIDTH
    others: tl.constexpr = 2 // WIDTH
    lane = row % 8 * 4 + at % 8 // 2
    step = at % span // 16
    word = ((row // 16 * (columns // span) + at // span) * 32 + lane) * 4 + step // (2 * others)
    value = tl.load(plane_ptr + word, mask=mask, other=0)
    place = at % 16 // 8 * 16 + row % 16 // 8 * 8 + step % 2 * 4 + at % 2 * 2 + step // 2 % others
    return (value >> place) & ((1 << WIDTH) - 1)


@triton.jit
def _code(planes, row, at, mask, columns, BITS: tl.constexpr, ADJACENT: tl.constexpr, NESTED: tl.constexpr):
    if NESTED:
        code = _nested_field(planes[0], row, at, mask, columns, 2)
        for bit in tl.static_range(2, BITS):
            code |= _nested_field(planes[bit - 1], row, at, mask, columns, 1) << bit
    else:
        WIDE: tl.constexpr = 8 if BITS == 8 else (4 if BITS >= 4 else 2)
        code = _fragment_field(planes[0], row, at, mask, columns, WIDE, WIDE, ADJACENT)
        if BITS == 3:
            code |= _fragment_field(planes[1], row, at, mask, columns, 1, WIDE, ADJACENT) << 2
        elif BITS == 5:
            code |= _fragment_field(planes[1], row, at, mask, columns, 1, WIDE, ADJACENT) << 4
        elif BITS >= 6 and BITS < 8:
            code |= _fragment_field(planes[1], row, at, mask, columns, 2, WIDE, ADJACENT) << 4
            if BITS == 7:
                code |= _fragment_field(planes[2], row, at, mask, columns, 1, WIDE, ADJACENT) << 6
    return code


@triton.jit
def _scale(values_ptr, super_ptr, row, block, blocks, padded_blocks, mask, SUPER: tl.constexpr):
    """The scale or offset of a block, fp32. Stored (N' / 16, blocks', 16); superblocks count blocks without padding."""
    index = (row // 16 * padded_blocks + block) * 16 + row % 16
    value = tl.load(values_ptr + index, mask=mask, other=0).to(tl.float32)
    if SUPER > 0:
        value *= tl.load(super_ptr + (row * blocks + block) // SUPER, mask=mask, other=0.0)
    return value


@triton.jit
def embed_kernel(
    ids_ptr,
    planes,
    table_ptr,
    scales_ptr,
    scales_super_ptr,
    offsets_ptr,
    offsets_super_ptr,
    out_ptr,
    columns,
    padded_columns,
    blocks,
    padded_blocks,
    block_size,
    zero,
    multiplier,
    BITS: tl.constexpr,
    KIND: tl.constexpr,
    SUPER: tl.constexpr,
    OFFSETS: tl.constexpr,
    CHOSEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK values of one row: table[code] * multiplier * scale (+ offset)."""
    place = tl.program_id(0).to(tl.int64)
    row = place
    if CHOSEN:
        row = tl.load(ids_ptr + place).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < columns
    NESTED: tl.constexpr = KIND == "nested" or KIND == "nested-pairs"
    code = _code(planes, row, at, mask, padded_columns, BITS, KIND == "pairs", NESTED)
    if KIND == "int":
        value = (code - zero).to(tl.float32)
        if OFFSETS:  # levels with offset lie half a step beside the integers
            value += 0.5
    elif KIND == "pairs":  # the entry whose low half is this code: fields of the planes, each beside a zero
        entry = code if BITS == 2 else (code & 3) | (code >> 2 << 4)
        value = tl.load(table_ptr + 2 * entry).to(tl.float32)
    elif KIND == "nested-pairs":
        value = tl.load(table_ptr + 2 * ((code & 3) | (code & 4) << 2)).to(tl.float32)
    else:
        value = tl.load(table_ptr + code).to(tl.float32)
    block = at // block_size
    scale = _scale(scales_ptr, scales_super_ptr, row, block, blocks, padded_blocks, mask, SUPER)
    value = value * (multiplier * scale)
    if OFFSETS:
        value += _scale(offsets_ptr, offsets_super_ptr, row, block, blocks, padded_blocks, mask, SUPER)
    tl.store(out_ptr + place * columns + at, value.to(out_ptr.dtype.element_ty), mask=mask)


def embed(weight: TritonWeight, ids: torch.Tensor | None = None, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Rows of a prepared matrix.

    Args:
        weight: (N, K).
        ids: rows, any integer type and shape, each in [0, N) (not checked); None for the whole matrix.
        dtype: of the result, by default the weight's type of activations.

    Returns:
        (*ids.shape, K), or (N, K).
    """
    dtype = dtype or weight.dtype
    rows, columns = weight.shape
    if weight.dense is not None:
        return (weight.dense if ids is None else weight.dense[ids]).to(dtype)
    if weight.outliers is not None:
        raise UnsupportedError(f"rows of a matrix that keeps weights apart ({weight.format}) are not looked up")
    assert weight.scales is not None
    scales = weight.scales
    shape = (rows,) if ids is None else tuple(ids.shape)
    out = torch.empty((*shape, columns), dtype=dtype, device=scales.device)
    if out.numel() == 0:
        return out
    table = weight.table
    if table is not None and weight.kind.endswith("pairs"):
        table = table.view(weight.dtype)
    embed_kernel[(out.numel() // columns, triton.cdiv(columns, _BLOCK))](
        scales if ids is None else ids.reshape(-1).contiguous(),
        weight.planes,
        scales if table is None else table,
        scales,
        scales if weight.scales_super is None else weight.scales_super,
        scales if weight.offsets is None else weight.offsets,
        scales if weight.offsets_super is None else weight.offsets_super,
        out,
        columns,
        weight.padded[1],
        weight.blocks,
        scales.shape[1],
        weight.block_size or weight.padded[1],
        weight.zero,
        weight.multiplier,
        BITS=weight.bits,
        KIND=weight.kind,
        SUPER=SUPERBLOCK if weight.scales_super is not None else 0,
        OFFSETS=weight.offsets is not None,
        CHOSEN=ids is not None,
        BLOCK=_BLOCK,
        num_warps=4,
    )
    return out
