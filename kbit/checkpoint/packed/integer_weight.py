"""Weights of whole numbers: value = (code - zero) * scale, the form of GPTQ, AWQ and compressed-tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kbit.checkpoint.packed.levels import Levels, LevelWeight, pays
from kbit.checkpoint.packed.weight import Blocks, BlockWeight, DenseWeight, PackedWeight, can_block, integers
from kbit.formats.quant_format import QuantFormat
from kbit.formats.stored import widened


@dataclass(frozen=True)
class IntegerRows:
    """Some rows.

    Attributes:
        codes: uint8 (R, K).
        scales: (R, G), in their type; 16-bit ones as patterns.
        zeros: whole numbers (R, G); None where all are the weight's `zero`.
    """

    codes: NDArray[np.uint8]
    scales: NDArray[Any]
    zeros: NDArray[Any] | None


def integer_weight(
    name: str,
    shape: tuple[int, int],
    parts: tuple[str, ...],
    label: str,
    *,
    bits: int,
    group: int,
    kind: str,
    zero: int | None,
    read: Callable[[int, int], IntegerRows],
    group_of: Callable[[], NDArray[np.intp]] | None = None,
) -> PackedWeight:
    """A weight, held packed where that is exact.

    With a scale of 16 bits a product with a number of up to 9 bits is exact in float32, and so is the sum of two such
    products that is one itself: code * scale - zero * scale. The libraries round the value to the type of the scale;
    packed it is not rounded at all. Scales in float32 are exact without zeros only.

    Args:
        name, shape, parts, label: see PackedWeight.
        bits: of a code.
        group: columns that share a scale; 0: all of a row.
        kind: type of the scales, and that of the library's products.
        zero: the code of 0, where it is one for all; None where each group has its own.
        read: rows (start, stop) -> what the file holds.
        group_of: the group of every column (K,), where they do not stand side by side (GPTQ's act-order).
    """
    columns = shape[1]
    group = 0 if group == columns else group
    exact = kind != "fp32" or zero is not None
    if group_of is None and exact and can_block(group, columns) and bits >= 2:
        middle = 2 ** (bits - 1)
        if zero is not None:
            format = QuantFormat("int", bits, group, scale_dtype=kind)
            codebook = integers(bits, zero)
        else:
            format = QuantFormat("int", bits, group, asymmetric=True, scale_dtype="fp32")
            codebook = integers(bits, middle)

        def read_blocks(start: int, stop: int) -> Blocks:
            found = read(start, stop)
            if zero is not None:
                return Blocks(found.codes, np.ascontiguousarray(found.scales))
            assert found.zeros is not None
            scales = np.ascontiguousarray(widened(found.scales, kind))
            return Blocks(found.codes, scales, scales * (middle - found.zeros.astype(np.float32)))

        return BlockWeight(name, shape, parts, label, format, codebook, read_blocks)

    if pays(bits, group or columns):
        steps = np.arange(1 << bits, dtype=np.float32)

        def levels(start: int, stop: int) -> Levels:
            found = read(start, stop)
            if zero is None:
                assert found.zeros is not None
                values = steps - found.zeros.astype(np.float32)[..., None]
            else:
                values = np.broadcast_to(steps - np.float32(zero), (*found.scales.shape, len(steps)))
            values = values * widened(found.scales, kind)[..., None]
            order = group_of() if group_of is not None else np.arange(columns) // (group or columns)
            return Levels(found.codes, values, order.astype(np.int32))

        return LevelWeight(name, shape, parts, label, kind, levels)

    def decode(start: int, stop: int) -> NDArray[np.float32]:
        found = read(start, stop)
        at = group_of() if group_of is not None else np.arange(columns, dtype=np.intp) // (group or columns)
        values = found.codes.astype(np.float32)
        if zero is not None:
            values -= np.float32(zero)
        else:
            assert found.zeros is not None
            values -= np.take(found.zeros.astype(np.float32), at, axis=1)
        values *= np.take(widened(found.scales, kind), at, axis=1)
        return values

    return DenseWeight(name, shape, parts, label, kind, decode)
