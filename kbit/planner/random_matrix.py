"""Matrices of random codes for the native kernels: what a code stands for does not matter to their speed. No torch."""

from __future__ import annotations

import numpy as np

from kbit import _native
from kbit.backends.cpu.weight import prepare_stored
from kbit.formats.quant_format import QuantFormat, plane_widths
from kbit.formats.stored import StoredMatrix
from kbit.formats.trellis import TrellisFormat

# A matrix of the size of those in a small model; a large one is many of these to the kernels.
ROWS = COLUMNS = 1024


def random_matrix(
    format: QuantFormat | TrellisFormat | str, context: _native.Context, rows: int = ROWS, columns: int = COLUMNS
) -> _native.Matrix:
    """A matrix of random codes, or of random floats.

    Args:
        format: one of QuantFormat or TrellisFormat; or "fp32", "fp16", "bf16".
        context: whose kernels will run it.
        rows, columns: N and K.
    """
    generator = np.random.default_rng(rows + columns)
    if isinstance(format, str):
        if format == "fp32":
            return _native.Matrix.dense(generator.standard_normal((rows, columns), dtype=np.float32), format, context)
        halves = generator.standard_normal((rows, columns), dtype=np.float32).astype(np.float16).view(np.uint16)
        return _native.Matrix.dense(halves, format, context)
    if isinstance(format, TrellisFormat):
        parts = format.parts(rows, columns)
        bytes_of = {name: generator.integers(0, 256, parts[name].shape, dtype=np.uint8) for name in ("codes", "signs")}
        scales = np.full(parts["scales"].shape, np.float16(0.01).view(np.uint16))
        return prepare_stored(
            StoredMatrix(format, (rows, columns), {**bytes_of, "scales": scales}, np.zeros(0, np.float32)), context
        ).matrix
    from kbit.formats.codebooks import codebook

    planes = [
        generator.integers(0, 256, (rows, -(-columns * width // 8)), dtype=np.uint8)
        for width in plane_widths(format.bits)
    ]
    shape = (rows, format.blocks_per_row(columns))
    kind = format.scale_dtype
    one = {"fp16": np.float16(0.01).view(np.uint16), "bf16": np.uint16(0x3C24), "fp32": np.float32(0.01)}[kind]
    scales = np.full(shape, one)
    values = codebook(format, columns).astype(np.float32)
    offsets = scales if format.asymmetric else None
    return _native.Matrix.quantized(
        planes, format.bits, columns, format.block_size, scales, offsets, kind, values, context
    )
