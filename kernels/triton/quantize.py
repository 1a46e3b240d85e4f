"""Rounding a matrix to a k-bit format on the GPU: what kbit/formats/blockwise.py means, bit for bit.

    x (N, K) fp16, bf16 or fp32 -> planes uint8, scales, offsets

Two kernels, as there: one finds every block's scale (and offset), one finds the codes and packs them. Between them
torch rounds the scales as they are stored. Both read x once: the roofline is memory, 2 or 4 bytes a weight, twice. A
program has a run of one row.

Codes come from a search for the value among the midpoints of the codebook's levels: k steps, each a load from a table
of at most 1 KB. Reciprocals of scales are taken in torch, since Triton's division of fp32 is not rounded to nearest on
every target, and products and differences are not fused, so that codes equal those of the CPU.
"""

from __future__ import annotations

from math import gcd

import numpy as np
import torch
import triton
import triton.language as tl

from kbit.errors import KbitError
from kbit.formats import blockwise
from kbit.formats.codebooks import codebook as format_codebook
from kbit.formats.codebooks import quantile_codebook
from kbit.formats.quant_format import QuantFormat, plane_widths
from kbit.formats.quant_tensor import QuantTensor
from kbit.formats.scales import load_scales, store_scales

# Weights of a program: 16 a thread with 4 warps.
_TILE = 2048


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
def _store_plane(plane_ptr, codes, row, group, columns, WIDTH: tl.constexpr, SHIFT: tl.constexpr, GROUPS: tl.constexpr):
    """Bits [SHIFT, SHIFT + WIDTH) of codes (GROUPS, 8) as WIDTH bytes a group."""
    per_byte: tl.constexpr = 8 // WIDTH
    row_bytes = (columns + per_byte - 1) // per_byte
    field = (codes >> SHIFT) & ((1 << WIDTH) - 1)
    places = (tl.arange(0, 8) % per_byte) * WIDTH
    bytes_ = tl.sum(tl.reshape(field << places[None, :], (GROUPS, WIDTH, per_byte)), axis=2)
    at = group[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(plane_ptr + row * row_bytes + at, bytes_.to(tl.uint8), mask=at < row_bytes)


@triton.jit
def encode_kernel(
    x_ptr,
    reciprocals_ptr,
    offsets_ptr,
    borders_ptr,
    codes_ptr,
    plane0_ptr,
    plane1_ptr,
    plane2_ptr,
    columns,
    blocks,
    block_size,
    stride,
    BITS: tl.constexpr,
    OFFSETS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Codes of GROUPS runs of 8 weights of a row: the number of borders below (x - offset) / scale, renamed."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    at = group[:, None] * 8 + tl.arange(0, 8)[None, :]
    mask = at < columns
    x = tl.load(x_ptr + row * stride + at, mask=mask, other=0.0).to(tl.float32)
    block = row * blocks + at // block_size
    if OFFSETS:
        x -= tl.load(offsets_ptr + block, mask=mask, other=0.0)
    x *= tl.load(reciprocals_ptr + block, mask=mask, other=0.0)
    index = tl.zeros((GROUPS, 8), dtype=tl.int32)
    for step in tl.static_range(BITS):  # a border equal to the value does not count: it goes to the lower level
        border = tl.load(borders_ptr + index + ((1 << (BITS - 1 - step)) - 1))
        index += tl.where(border < x, 1 << (BITS - 1 - step), 0)
    codes = tl.where(mask, tl.load(codes_ptr + index).to(tl.int32), 0)
    WIDE: tl.constexpr = 8 if BITS == 8 else (4 if BITS >= 4 else 2)
    _store_plane(plane0_ptr, codes, row, group, columns, WIDE, 0, GROUPS)
    if BITS == 3:
        _store_plane(plane1_ptr, codes, row, group, columns, 1, 2, GROUPS)
    elif BITS == 5:
        _store_plane(plane1_ptr, codes, row, group, columns, 1, 4, GROUPS)
    elif BITS >= 6 and BITS < 8:
        _store_plane(plane1_ptr, codes, row, group, columns, 2, 4, GROUPS)
        if BITS == 7:
            _store_plane(plane2_ptr, codes, row, group, columns, 1, 6, GROUPS)


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
) -> list[torch.Tensor]:
    """Codes as bit planes.

    Args:
        x: (N, K), K contiguous.
        reciprocals: float32 (N, blocks), 1 / scale, or 0 for a block whose weights all get the code of zero.
        offsets: float32 (N, blocks) or None.
        borders: float32 (2^k - 1,), ascending: midpoints between levels, then infinities.
        codes: uint8 (2^k,): the code of each level, in ascending order of level.
        bits: k.
        block_size: weights of a block; 0 for one block a row.

    Returns:
        Planes uint8 (N, ceil(K w / 8)), widest first.

    Raises:
        ValueError: the tables do not have the sizes of k bits.
    """
    if borders.shape != (2**bits - 1,) or codes.shape != (2**bits,):
        raise ValueError(
            f"{bits} bits need {2**bits - 1} borders and {2**bits} codes, not {len(borders)}, {len(codes)}"
        )
    rows, columns = x.shape
    blocks = reciprocals.shape[1]
    planes = [
        torch.empty((rows, triton.cdiv(columns * width, 8)), dtype=torch.uint8, device=x.device)
        for width in plane_widths(bits)
    ]
    three = planes + [planes[0]] * (3 - len(planes))
    groups = min(_TILE // 8, triton.next_power_of_2(triton.cdiv(columns, 8)))
    encode_kernel[(rows, triton.cdiv(columns, 8 * groups))](
        x,
        reciprocals,
        reciprocals if offsets is None else offsets,
        borders,
        codes,
        *three,
        columns,
        blocks,
        block_size or columns,
        x.stride(0),
        BITS=bits,
        OFFSETS=offsets is not None,
        GROUPS=groups,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return planes


def quantize(
    x: torch.Tensor, format: QuantFormat, *, like: QuantTensor | None = None, name: str = "tensor"
) -> QuantTensor:
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
    borders, codes = _tables(levels, format.bits)
    planes = encode(x, reciprocals, offsets, borders.to(x.device), codes.to(x.device), format.bits, format.block_size)
    names = [f"plane{width}" for width in plane_widths(format.bits)]
    stored = {**dict(zip(names, planes, strict=True)), **parts}
    ordered = {suffix: stored[suffix] for suffix in format.parts(rows, columns)}
    return QuantTensor(format, (rows, columns), ordered, levels.to(x.device))


def _sample(x: torch.Tensor) -> torch.Tensor:
    """The values a quantile codebook is estimated from, the same as on the CPU."""
    rows, columns = x.shape
    stride = max(1, rows * columns // blockwise.QUANTILE_SAMPLE)
    while gcd(stride, columns) != 1:
        stride += 1
    return x.reshape(-1)[::stride]


def _tables(levels: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Borders and codes of a codebook, filled up to the sizes that `encode` wants."""
    encoder = blockwise.Encoder.for_codebook(levels)
    borders = torch.full((2**bits - 1,), float("inf"))
    borders[: len(encoder.borders)] = encoder.borders
    codes = torch.zeros(2**bits, dtype=torch.uint8)
    codes[: len(encoder.codes)] = encoder.codes
    return borders, codes
