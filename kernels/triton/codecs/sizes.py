"""Sizes of weights as the Triton kernels read them (`kbit.kernels.triton.codecs.layout`), known without torch."""

from __future__ import annotations

from kbit.formats.quant_format import SUPERBLOCK, QuantFormat, plane_widths
from kbit.formats.trellis import TILE, TrellisFormat

ROW_TILE = 16  # rows of one mma.m16n8k16
_SCALE_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}


def columns_multiple(bits: int) -> int:
    """What K is padded to: 128 bits per lane of the narrowest plane, and at least 64."""
    return max(64, 256 // min(plane_widths(bits)))


def padded_shape(format: QuantFormat, rows: int, columns: int) -> tuple[int, int]:
    """(N', K')."""
    return _up(rows, ROW_TILE), _up(columns, columns_multiple(format.bits))


def planes_bytes(format: QuantFormat, rows: int, columns: int) -> int:
    """Bytes of a prepared matrix: codes, scales and offsets, padding included, its codebook's table left out."""
    rows, columns = padded_shape(format, rows, columns)
    numbers = rows * format.blocks_per_row(columns)
    scales = numbers * (1 if format.double_quant else _SCALE_BYTES[format.scale_dtype])
    if format.double_quant:
        scales += 4 * -(-numbers // SUPERBLOCK)
    return rows * columns * format.bits // 8 + scales * (2 if format.asymmetric else 1)


def nested_padded_shape(rows: int, columns: int) -> tuple[int, int]:
    """(N', K') of a nested matrix, at every width: a plane of one bit has 128 bits a lane in 256 columns."""
    return _up(rows, ROW_TILE), _up(columns, 256)


def nested_bytes(format: QuantFormat, rows: int, columns: int) -> int:
    """Bytes of a prepared nested matrix at a width, planes and the width's scales, padding included, no table.

    Args:
        format: the plain one of this width, with the same blocks and scales.
        rows, columns: N and K.
    """
    rows, columns = nested_padded_shape(rows, columns)
    return rows * columns * format.bits // 8 + rows * format.blocks_per_row(columns) * _SCALE_BYTES[format.scale_dtype]


def trellis_bytes(format: TrellisFormat, rows: int, columns: int) -> int:
    """Bytes of a prepared trellis: its tiles, fp16 scales of rows, and a float32 for every rotated column."""
    rows, columns = _up(rows, TILE), _up(columns, TILE)
    return rows // TILE * (columns // TILE) * format.tile_bytes + 2 * rows + 4 * columns


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
