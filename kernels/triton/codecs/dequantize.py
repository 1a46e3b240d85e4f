"""From the portable layout of a k-bit matrix (kbit/formats) to values: whole matrices, or chosen rows (embeddings).

    planes uint8 (N, ceil(K w / 8)), scales (N, blocks) -> values (R, K)

A program has a run of one row. A weight costs a byte load per plane (neighbours share bytes, so they come from the
same sectors), an entry of the codebook (at most 1 KB: it stays in the L1 cache) and a shared scale. The roofline is
memory: k / 8 bytes read and 2 or 4 written a weight. Results equal QuantTensor.dequantize bit for bit: products and
sums are not fused, and the result is rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import triton
import triton.language as tl

from kbit.formats.nested import NestedFormat
from kbit.formats.outlier_weights import add_outliers
from kbit.formats.planes_codec import PlanesTensor
from kbit.formats.quant_format import SUPERBLOCK, plane_widths
from kbit.formats.quant_tensor import QuantTensor

# Weights of a program: 8 a thread with 4 warps, so a thread's results are one 128-bit store in half precision.
_BLOCK = 1024


@triton.jit
def _field(plane_ptr, row, at, mask, columns, WIDTH: tl.constexpr):
    """Bits of a plane for the weights at columns `at` of a row, int32."""
    per_byte: tl.constexpr = 8 // WIDTH
    row_bytes = (columns + per_byte - 1) // per_byte
    byte = tl.load(plane_ptr + row * row_bytes + at // per_byte, mask=mask, other=0).to(tl.int32)
    return (byte >> (at % per_byte * WIDTH)) & ((1 << WIDTH) - 1)


@triton.jit
def portable_codes(plane0_ptr, plane1_ptr, plane2_ptr, row, at, mask, columns, BITS: tl.constexpr):
    """Codes of a row in the portable layout, int32. Planes widest first; those that BITS does not have are not read."""
    WIDE: tl.constexpr = 8 if BITS == 8 else (4 if BITS >= 4 else 2)
    code = _field(plane0_ptr, row, at, mask, columns, WIDE)
    if BITS == 3:
        code |= _field(plane1_ptr, row, at, mask, columns, 1) << 2
    elif BITS == 5:
        code |= _field(plane1_ptr, row, at, mask, columns, 1) << 4
    elif BITS >= 6 and BITS < 8:
        code |= _field(plane1_ptr, row, at, mask, columns, 2) << 4
        if BITS == 7:
            code |= _field(plane2_ptr, row, at, mask, columns, 1) << 6
    return code


@triton.jit
def block_value(values_ptr, super_ptr, row, block, blocks, mask, SUPER: tl.constexpr):
    """The scale or offset of a block, fp32; SUPER > 0: 8 bits times the factor of its superblock of SUPER blocks."""
    index = row * blocks + block
    value = tl.load(values_ptr + index, mask=mask, other=0).to(tl.float32)
    if SUPER > 0:
        value *= tl.load(super_ptr + index // SUPER, mask=mask, other=0.0)
    return value


@triton.jit
def dequantize_kernel(
    plane0_ptr,
    plane1_ptr,
    plane2_ptr,
    scales_ptr,
    scales_super_ptr,
    offsets_ptr,
    offsets_super_ptr,
    codebook_ptr,
    ids_ptr,
    out_ptr,
    columns,
    blocks,
    block_size,
    BITS: tl.constexpr,
    SUPER: tl.constexpr,
    OFFSETS: tl.constexpr,
    CHOSEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK weights of one row: codebook[code] * scale (+ offset)."""
    place = tl.program_id(0).to(tl.int64)
    row = place
    if CHOSEN:
        row = tl.load(ids_ptr + place).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < columns
    code = portable_codes(plane0_ptr, plane1_ptr, plane2_ptr, row, at, mask, columns, BITS)
    block = at // block_size
    value = tl.load(codebook_ptr + code)
    value *= block_value(scales_ptr, scales_super_ptr, row, block, blocks, mask, SUPER)
    if OFFSETS:
        value += block_value(offsets_ptr, offsets_super_ptr, row, block, blocks, mask, SUPER)
    tl.store(out_ptr + place * columns + at, value.to(out_ptr.dtype.element_ty), mask=mask)


def dequantize_planes(
    planes: Sequence[torch.Tensor],
    scales: torch.Tensor,
    scales_super: torch.Tensor | None,
    offsets: torch.Tensor | None,
    offsets_super: torch.Tensor | None,
    codebook: torch.Tensor,
    columns: int,
    bits: int,
    block_size: int,
    dtype: torch.dtype = torch.float32,
    ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Values of a matrix in the portable layout, or of chosen rows.

    Args:
        planes: uint8 (N, ceil(K w / 8)) each, widest first.
        scales: (N, blocks) as stored; uint8 with scales_super.
        scales_super: float32 factors of superblocks, or None.
        offsets: as scales, or None; int8 with offsets_super.
        offsets_super: as scales_super.
        codebook: float32 (2^k,).
        columns: K.
        bits: k.
        block_size: weights of a block; 0 for one block a row.
        dtype: of the result.
        ids: rows, any integer type and shape; each must be in [0, N) (not checked). None for all rows.

    Returns:
        (*ids.shape, K), or (N, K).

    Raises:
        ValueError: the planes are not those of k bits.
    """
    if len(planes) != len(plane_widths(bits)):
        raise ValueError(f"{bits} bits have {len(plane_widths(bits))} planes, not {len(planes)}")
    rows, blocks = scales.shape
    shape = (rows,) if ids is None else tuple(ids.shape)
    out = torch.empty((*shape, columns), dtype=dtype, device=scales.device)
    if out.numel() == 0:
        return out
    first, *others = (plane.contiguous() for plane in planes)
    others += [first] * (2 - len(others))
    dequantize_kernel[(out.numel() // columns, triton.cdiv(columns, _BLOCK))](
        first,
        *others,
        scales.contiguous(),
        scales if scales_super is None else scales_super,
        scales if offsets is None else offsets.contiguous(),
        scales if offsets_super is None else offsets_super,
        codebook,
        scales if ids is None else ids.reshape(-1).contiguous(),
        out,
        columns,
        blocks,
        block_size or columns,
        BITS=bits,
        SUPER=0 if scales_super is None else SUPERBLOCK,
        OFFSETS=offsets is not None,
        CHOSEN=ids is not None,
        BLOCK=_BLOCK,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return out


@triton.jit
def dequantize_nested_kernel(
    planes, scales_ptr, factors_ptr, codebook_ptr, ids_ptr, out_ptr, columns, blocks, block_size,
    BITS: tl.constexpr, CHOSEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK weights of one row at a width: codebook[code] * round(scale * factor)."""
    place = tl.program_id(0).to(tl.int64)
    row = place
    if CHOSEN:
        row = tl.load(ids_ptr + place).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < columns
    code = _field(planes[0], row, at, mask, columns, 2)
    for bit in tl.static_range(2, BITS):
        code |= _field(planes[bit - 1], row, at, mask, columns, 1) << bit
    scale = tl.load(scales_ptr + row * blocks + at // block_size, mask=mask, other=0)
    scaled = scale.to(tl.float32) * tl.load(factors_ptr + row).to(tl.float32)
    value = tl.load(codebook_ptr + code) * scaled.to(scale.dtype).to(tl.float32)
    tl.store(out_ptr + place * columns + at, value.to(out_ptr.dtype.element_ty), mask=mask)


def dequantize_nested(
    matrix: QuantTensor, width: int, dtype: torch.dtype = torch.float32, ids: torch.Tensor | None = None
) -> torch.Tensor:
    """Values of a nested matrix at one of its widths, or of chosen rows; planes above the width are not read.

    Args:
        matrix: (N, K), in the portable layout (kbit.formats.nested).
        width: one that its format serves.
        dtype: of the result.
        ids: as for dequantize_planes.

    Returns:
        (*ids.shape, K), or (N, K).

    Raises:
        UsageError: the width is not served.
    """
    assert isinstance(matrix.format, NestedFormat)
    format, (rows, columns) = matrix.format.narrowed(width), matrix.shape
    scales, factors = matrix.stored["scales"].contiguous(), matrix.stored[f"factor{width}"].contiguous()
    shape = (rows,) if ids is None else tuple(ids.shape)
    out = torch.empty((*shape, columns), dtype=dtype, device=scales.device)
    if out.numel() == 0:
        return out
    dequantize_nested_kernel[(out.numel() // columns, triton.cdiv(columns, _BLOCK))](
        tuple(matrix.stored[name].contiguous() for name in format.planes_at(width)),
        scales,
        factors,
        matrix.codebook[format.levels_at(width)].contiguous(),
        scales if ids is None else ids.reshape(-1).contiguous(),
        out,
        columns,
        scales.shape[1],
        format.block_size or columns,
        BITS=width,
        CHOSEN=ids is not None,
        BLOCK=_BLOCK,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return out


def dequantize(
    weight: QuantTensor, dtype: torch.dtype = torch.float32, ids: torch.Tensor | None = None
) -> torch.Tensor:
    """weight.dequantize(dtype), or rows of it, on its device: of a matrix in a planes format, or of a nested one."""
    if isinstance(weight.format, NestedFormat):
        return dequantize_nested(weight, weight.format.bits, dtype, ids)
    matrix = PlanesTensor.of(weight)
    stored = matrix.stored
    if matrix.format.outliers:  # added to what is not rounded yet
        plain = replace(matrix, format=matrix.format.keeping(0))
        rows = torch.arange(matrix.shape[0], device=matrix.device) if ids is None else ids.reshape(-1)
        found = dequantize(plain, torch.float32, ids).view(len(rows), -1)
        found = add_outliers(found, stored, matrix.shape[1], rows).to(dtype)
        return found if ids is None else found.view(*ids.shape, -1)
    return dequantize_planes(
        matrix.planes,
        stored["scales"],
        stored.get("scales_super"),
        stored.get("offsets"),
        stored.get("offsets_super"),
        matrix.codebook,
        matrix.shape[1],
        matrix.format.bits,
        matrix.format.block_size,
        dtype,
        ids,
    )
