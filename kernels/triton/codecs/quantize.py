"""Rounding a matrix to a k-bit format on the GPU: what kbit/formats/blockwise.py means, bit for bit.

    x (N, K) fp16, bf16 or fp32 -> planes uint8, scales, offsets

Two kernels, as there: one finds every block's scale (and offset), one finds the codes and packs them. Between them
torch rounds the scales as they are stored. Both read x once: the roofline is memory, 2 or 4 bytes a weight, twice. A
program has a run of one row.

Codes come from the borders between the codebook's levels, the midpoints: the range is cut into cells with at most one
border each, and a table says for every cell the border and the codes on both sides of it, so that one load of 64 bits
and one comparison find a code (kbit.formats.blockwise has the same method on the CPU). A codebook with borders too
close for such a table is searched: k steps, each a load from at most 1 KB. Reciprocals of scales are taken in torch,
since Triton's division of fp32 is not rounded to nearest on every target, and products and differences are not fused,
so that codes equal those of the CPU.
"""

from __future__ import annotations

from math import gcd

import numpy as np
import torch
import triton
import triton.language as tl

from kbit.formats import blockwise
from kbit.formats.codebooks import codebook as format_codebook
from kbit.formats.codebooks import quantile_codebook
from kbit.formats.planes_codec import PlanesTensor
from kbit.formats.quant_format import QuantFormat, plane_widths
from kbit.formats.quant_tensor import QuantTensor
from kbit.formats.scales import load_scales, store_scales
from kbit.host.errors import KbitError

# Weights of a program: 16 a thread with 4 warps.
_TILE = 2048
# Cells of a table, at most: 32 KB, which an L1 cache holds. 8-bit codebooks need 256 to 1024, dynamic ones too many.
_MOST_CELLS = 4096


@triton.jit
def statistics_kernel(
    x_ptr,
    scales_ptr,
    offsets_ptr,
    columns,
    blocks,
    block_size,
    stride,
    ASYMMETRIC: tl.constexpr,
    BLOCKS: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Scales (and offsets) of BLOCKS blocks of a row, SPAN weights of each at a time."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    there = block < blocks
    low = tl.full((BLOCKS,), float("inf"), dtype=tl.float32)
    high = tl.full((BLOCKS,), float("-inf"), dtype=tl.float32)
    for start in range(0, block_size, SPAN):
        inside = start + tl.arange(0, SPAN)
        at = block[:, None] * block_size + inside[None, :]
        mask = (inside[None, :] < block_size) & (at < columns)
        x = tl.load(x_ptr + row * stride + at, mask=mask, other=0.0).to(tl.float32)
        if ASYMMETRIC:
            low = tl.minimum(low, tl.min(tl.where(mask, x, float("inf")), axis=1))
            high = tl.maximum(high, tl.max(tl.where(mask, x, float("-inf")), axis=1))
        else:
            high = tl.maximum(high, tl.max(tl.where(mask, tl.abs(x), float("-inf")), axis=1))
    place = row * blocks + block
    if ASYMMETRIC:  # halved first: high - low may overflow
        tl.store(scales_ptr + place, high * 0.5 - low * 0.5, mask=there)
        tl.store(offsets_ptr + place, high * 0.5 + low * 0.5, mask=there)
    else:
        tl.store(scales_ptr + place, high, mask=there)


@triton.jit
def _store_plane(
    plane_ptr, codes, row, group, columns,
    WIDTH: tl.constexpr, SHIFT: tl.constexpr, GROUPS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Bits [SHIFT, SHIFT + WIDTH) of codes (GROUPS, 8) as WIDTH bytes a group; one number of WIDTH bytes if WHOLE."""
    field = (codes >> SHIFT) & ((1 << WIDTH) - 1)
    if WHOLE and WIDTH < 8:
        number = tl.sum(field << (tl.arange(0, 8) * WIDTH)[None, :], axis=1)
        kind: tl.constexpr = tl.int32 if WIDTH == 4 else (tl.int16 if WIDTH == 2 else tl.int8)
        to = plane_ptr.to(tl.pointer_type(kind), bitcast=True) + row * (columns // 8) + group
        tl.store(to, number.to(kind), mask=group * 8 < columns)
    else:
        per_byte: tl.constexpr = 8 // WIDTH
        row_bytes = (columns + per_byte - 1) // per_byte
        places = (tl.arange(0, 8) % per_byte) * WIDTH
        bytes_ = tl.sum(tl.reshape(field << places[None, :], (GROUPS, WIDTH, per_byte)), axis=2)
        at = group[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        tl.store(plane_ptr + row * row_bytes + at, bytes_.to(tl.uint8), mask=at < row_bytes)


@triton.jit
def _codes_of(x, borders_ptr, codes_ptr, cells_ptr, BITS: tl.constexpr, CELLS: tl.constexpr):
    """The code of each value, int32: that of the level after all borders below the value."""
    if CELLS > 0:
        # Adding 1.5 * 2^23 leaves the nearest whole number in the low bits (`cell_table` does the same sums).
        near = tl.minimum(tl.maximum(x, -1.0), 1.0) * (CELLS * 0.5) + (CELLS * 0.5 + 12582912.0)
        cell = tl.load(cells_ptr + (near.to(tl.int32, bitcast=True) - 0x4B400000))
        border = cell.to(tl.int32).to(tl.float32, bitcast=True)
        codes = ((cell >> 32).to(tl.int32) >> tl.where(border < x, 8, 0)) & 255
    else:
        index = tl.zeros(x.shape, dtype=tl.int32)
        for step in tl.static_range(BITS):  # a border equal to the value does not count: it goes to the lower level
            border = tl.load(borders_ptr + index + ((1 << (BITS - 1 - step)) - 1))
            index += tl.where(border < x, 1 << (BITS - 1 - step), 0)
        codes = tl.load(codes_ptr + index).to(tl.int32)
    return codes


@triton.jit
def encode_kernel(
    x_ptr, reciprocals_ptr, offsets_ptr, borders_ptr, codes_ptr, cells_ptr, plane0_ptr, plane1_ptr, plane2_ptr,
    columns, blocks, stride,
    BITS: tl.constexpr, BLOCK: tl.constexpr, OFFSETS: tl.constexpr, CELLS: tl.constexpr, GROUPS: tl.constexpr,
    PARTS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Codes of PARTS times GROUPS runs of 8 weights of a row. A run lies in one block; WHOLE: no run is cut short."""
    WIDE: tl.constexpr = 8 if BITS == 8 else (4 if BITS >= 4 else 2)
    row = tl.program_id(0).to(tl.int64)
    for part in tl.static_range(PARTS):
        group = (tl.program_id(1) * PARTS + part) * GROUPS + tl.arange(0, GROUPS)
        at = group[:, None] * 8 + tl.arange(0, 8)[None, :]
        inside = group * 8 < columns
        mask = inside[:, None] if WHOLE else at < columns
        x = tl.load(x_ptr + row * stride + at, mask=mask, other=0.0).to(tl.float32)
        block = row * blocks + (group * 8 // BLOCK if BLOCK > 0 else group * 0)
        if OFFSETS:
            x -= tl.load(offsets_ptr + block, mask=inside, other=0.0)[:, None]
        x *= tl.load(reciprocals_ptr + block, mask=inside, other=0.0)[:, None]
        codes = _codes_of(x, borders_ptr, codes_ptr, cells_ptr, BITS, CELLS)
        if not WHOLE:
            codes = tl.where(mask, codes, 0)
        _store_plane(plane0_ptr, codes, row, group, columns, WIDE, 0, GROUPS, WHOLE)
        if BITS == 3:
            _store_plane(plane1_ptr, codes, row, group, columns, 1, 2, GROUPS, WHOLE)
        elif BITS == 5:
            _store_plane(plane1_ptr, codes, row, group, columns, 1, 4, GROUPS, WHOLE)
        elif BITS >= 6 and BITS < 8:
            _store_plane(plane1_ptr, codes, row, group, columns, 2, 4, GROUPS, WHOLE)
            if BITS == 7:
                _store_plane(plane2_ptr, codes, row, group, columns, 1, 6, GROUPS, WHOLE)


def block_statistics(x: torch.Tensor, block_size: int, asymmetric: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale (and offset) of every block before rounding; see kbit.formats.blockwise.block_statistics.

    Args:
        x: (N, K), K contiguous.
        block_size: weights of a block; 0 for one block a row.
        asymmetric: blocks have an offset.

    Returns:
        float32 (N, blocks), twice or with None.
    """
    rows, columns = x.shape
    size = block_size or columns
    blocks = triton.cdiv(columns, size)
    scales = torch.empty((rows, blocks), dtype=torch.float32, device=x.device)
    offsets = torch.empty_like(scales) if asymmetric else None
    span = min(_TILE, triton.next_power_of_2(size))
    several = max(1, min(_TILE // span, triton.next_power_of_2(blocks)))
    statistics_kernel[(rows, triton.cdiv(blocks, several))](
        x,
        scales,
        scales if offsets is None else offsets,
        columns,
        blocks,
        size,
        x.stride(0),
        ASYMMETRIC=asymmetric,
        BLOCKS=several,
        SPAN=span,
        num_warps=4,
    )
    return scales, offsets


def encode(
    x: torch.Tensor,
    reciprocals: torch.Tensor,
    offsets: torch.Tensor | None,
    borders: torch.Tensor,
    codes: torch.Tensor,
    bits: int,
    block_size: int,
    cells: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """Codes as bit planes.

    Args:
        x: (N, K), K contiguous.
        reciprocals: float32 (N, blocks), 1 / scale, or 0 for a block whose weights all get the code of zero.
        offsets: float32 (N, blocks) or None.
        borders: float32 (2^k - 1,), ascending: midpoints between levels, then infinities.
        codes: uint8 (2^k,): the code of each level, in ascending order of level.
        bits: k.
        block_size: weights of a block, a multiple of 8; 0 for one block a row.
        cells: cell_table of the borders and codes, or None: then they are searched.

    Returns:
        Planes uint8 (N, ceil(K w / 8)), widest first.

    Raises:
        ValueError: the tables do not have the sizes of k bits, or the block size is no multiple of 8.
    """
    if borders.shape != (2**bits - 1,) or codes.shape != (2**bits,):
        raise ValueError(
            f"{bits} bits need {2**bits - 1} borders and {2**bits} codes, not {len(borders)}, {len(codes)}"
        )
    if block_size % 8:
        raise ValueError(f"blocks of {block_size} weights: a multiple of 8 wanted")
    rows, columns = x.shape
    blocks = reciprocals.shape[1]
    planes = [
        torch.empty((rows, triton.cdiv(columns * width, 8)), dtype=torch.uint8, device=x.device)
        for width in plane_widths(bits)
    ]
    three = planes + [planes[0]] * (3 - len(planes))
    groups = min(_TILE // 16, triton.next_power_of_2(triton.cdiv(columns, 8)))
    parts = min(2, triton.cdiv(columns, 8 * groups))
    encode_kernel[(rows, triton.cdiv(columns, 8 * groups * parts))](
        x,
        reciprocals,
        reciprocals if offsets is None else offsets,
        borders,
        codes,
        borders if cells is None else cells,
        *three,
        columns,
        blocks,
        x.stride(0),
        BITS=bits,
        BLOCK=block_size,
        OFFSETS=offsets is not None,
        CELLS=0 if cells is None else len(cells) - 1,
        GROUPS=groups,
        PARTS=parts,
        WHOLE=columns % 8 == 0,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return planes


def quantize(
    x: torch.Tensor, format: QuantFormat, *, like: QuantTensor | None = None, name: str = "tensor"
) -> PlanesTensor:
    """Quantize a matrix by rounding to nearest: kbit.formats.blockwise.quantize_blockwise, on x's device.

    Args:
        x: (N, K) fp16, bf16 or fp32.
        format: the target format.
        like: take codebook and scales from this tensor (on the same device) instead of computing them.
        name: what to call the tensor in errors.

    Raises:
        KbitError: x is empty, holds NaN or infinity, or a scale does not fit its stored type.
    """
    x = x.detach()
    rows, columns = x.shape
    if rows < 1 or columns < 1:
        raise KbitError(f"{name} is empty, {rows} x {columns}: there is nothing to quantize")
    if like is not None and (like.format, like.shape) != (format, (rows, columns)):
        raise KbitError(f"`like` is {like.format} {like.shape}, not {format} {(rows, columns)}")
    if not bool(torch.isfinite(x.sum(dtype=torch.float32))) and (bad := int((~torch.isfinite(x)).sum())):
        raise KbitError(f"{name}: {bad} weights are NaN or infinite: mend the source")
    x = x if x.stride(1) == 1 or columns == 1 else x.contiguous()
    if like is None:
        scales, offsets = block_statistics(x, format.block_size, format.asymmetric)
        parts = store_scales(scales, offsets, format)
        if format.has_own_codebook:
            sample = np.sort(_sample(x).float().cpu().numpy())
            levels = torch.from_numpy(quantile_codebook(sample, format.bits))
            parts["codebook"] = levels.to(x.device)
        else:
            levels = torch.from_numpy(format_codebook(format, columns).copy())
    else:
        parts = {key: value for key, value in like.stored.items() if not key.startswith("plane")}
        levels = like.codebook.cpu()
    decoded, offsets = load_scales(parts, "scales", format), load_scales(parts, "offsets", format)
    assert decoded is not None
    # As kbit.formats.blockwise.normalise: see there for the floor and the zeros.
    reciprocals = torch.where(decoded > 0, 1.0 / decoded.clamp(min=1e-38), 0.0)
    borders, codes = tables(levels, format.bits)
    cells = cell_table(borders, codes)
    planes = encode(
        x,
        reciprocals,
        offsets,
        borders.to(x.device),
        codes.to(x.device),
        format.bits,
        format.block_size,
        None if cells is None else cells.to(x.device),
    )
    names = [f"plane{width}" for width in plane_widths(format.bits)]
    stored = {**dict(zip(names, planes, strict=True)), **parts}
    ordered = {suffix: stored[suffix] for suffix in format.parts(rows, columns)}
    return PlanesTensor(format, (rows, columns), ordered, levels.to(x.device))


def _sample(x: torch.Tensor) -> torch.Tensor:
    """The values a quantile codebook is estimated from, the same as on the CPU."""
    rows, columns = x.shape
    stride = max(1, rows * columns // blockwise.QUANTILE_SAMPLE)
    while gcd(stride, columns) != 1:
        stride += 1
    return x.reshape(-1)[::stride]


def tables(levels: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Borders and codes of a codebook on the CPU, filled up to the sizes that `encode` wants."""
    encoder = blockwise.Encoder.for_codebook(levels)
    borders = torch.full((2**bits - 1,), float("inf"))
    borders[: len(encoder.borders)] = encoder.borders
    codes = torch.zeros(2**bits, dtype=torch.uint8)
    codes[: len(encoder.codes)] = encoder.codes
    return borders, codes


def cell_table(borders: torch.Tensor, codes: torch.Tensor) -> torch.Tensor | None:
    """What `encode` looks a code up in at once, on the CPU.

    Cell c of C + 1 holds the values v in [-1, 1] whose (v + 1) C / 2 rounds to c. That this is done in float32 does no
    harm: a value's cell never falls as the value rises, and borders are assigned to cells by the same arithmetic, so
    those in lower cells lie below the value, those in higher cells above it, and the one in its own is compared.

    Args:
        borders: as for encode; those that are not infinite lie in (-1, 1).
        codes: as for encode.

    Returns:
        int64 (C + 1,), C a power of two: the bits of the cell's border (infinite where there is none), 8 bits of the
        code of values up to it at bit 32, 8 bits of the code beyond it at bit 40. None where two borders are too close.
    """
    real = borders[borders.isfinite()]
    cells = 64
    while True:
        places = (real * (cells / 2) + (cells / 2 + 12582912.0)).view(torch.int32).long() - 0x4B400000
        if len(torch.unique(places)) == len(real):
            break
        cells *= 2
        if cells > _MOST_CELLS:
            return None
    border = torch.full((cells + 1,), torch.inf)
    border[places] = real
    below = torch.searchsorted(places, torch.arange(cells + 1))  # borders in lower cells
    beyond = codes[(below + 1).clamp(max=len(real))].long()
    return (border.view(torch.int32).long() & 0xFFFFFFFF) | codes[below].long() << 32 | beyond << 40
