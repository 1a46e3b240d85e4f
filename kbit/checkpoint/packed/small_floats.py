"""Weights whose codes of 4 and 8 bits are floats: OCP's E2M1 and E4M3 (Microscaling Formats v1.0)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kbit.checkpoint.packed.weight import Blocks, BlockWeight, DenseWeight, PackedTensors, PackedWeight, can_block
from kbit.formats.microscaling import E2M1, e4m3, nibbles
from kbit.formats.quant_format import QuantFormat
from kbit.formats.stored import widened
from kbit.host.errors import CheckpointError

Scales = Callable[[int, int], NDArray[Any]]


def refuse_nan(tensors: PackedTensors, name: str, codes: NDArray[np.uint8]) -> None:
    """Raise where a code of E4M3 is NaN.

    Raises:
        CheckpointError: one is.
    """
    if bool(((codes & 127) == 127).any()):
        raise CheckpointError(
            f"{tensors.path}: {name} holds NaN; the checkpoint is damaged or overflowed when it was converted; get it "
            "again"
        )


def four_bits(
    tensors: PackedTensors,
    name: str,
    codes: str,
    parts: tuple[str, ...],
    label: str,
    *,
    block: int,
    scale_kind: str,
    scales: Scales,
) -> PackedWeight:
    """A weight of E2M1 codes, two in a byte along the rows.

    Args:
        tensors: of the folder.
        name: of the weight.
        codes: of the tensor of bytes (N, K / 2).
        parts: names of all its tensors.
        label: see PackedWeight.
        block: columns that share a scale.
        scale_kind: type of the scales.
        scales: rows (start, stop) -> their scales (R, K / block); 16-bit ones as patterns.
    """
    rows, half = tensors.expect(codes, ("U8",)).shape
    format = QuantFormat("float", 4, block, exponent_bits=2, grid="ocp", scale_dtype=scale_kind)

    def read(start: int, stop: int) -> Blocks:
        return Blocks(nibbles(tensors.read(codes, start, stop)), np.ascontiguousarray(scales(start, stop)))

    return BlockWeight(name, (rows, 2 * half), parts, label, format, E2M1, read)


def eight_bits(
    tensors: PackedTensors,
    name: str,
    parts: tuple[str, ...],
    label: str,
    *,
    block: int,
    scale_kind: str,
    scales: Scales,
    codes_in: str | None = None,
) -> PackedWeight:
    """A weight of E4M3 codes: see four_bits. `block` is 0 where a row shares a scale; `codes_in` is the tensor of codes
    where it has not the weight's name.

    The libraries round the products to the type of the scales; packed they are not rounded but to float32.

    Raises (on reading):
        CheckpointError: a code is NaN.
    """
    own = codes_in or name
    info = tensors.expect(own, ("F8_E4M3",))
    shape = (info.shape[0], info.shape[1])
    block = 0 if block == shape[1] else block

    def codes(start: int, stop: int) -> NDArray[np.uint8]:
        found: NDArray[np.uint8] = tensors.read(own, start, stop)
        refuse_nan(tensors, own, found)
        return found

    values = e4m3()
    if can_block(block, shape[1]):
        format = QuantFormat("float", 8, block, exponent_bits=4, grid="ocp", scale_dtype=scale_kind)

        def read(start: int, stop: int) -> Blocks:
            return Blocks(codes(start, stop), np.ascontiguousarray(scales(start, stop)))

        return BlockWeight(name, shape, parts, label, format, values, read)

    def decode(start: int, stop: int) -> NDArray[np.float32]:
        wide = widened(scales(start, stop), scale_kind).repeat(block, axis=1)[:, : shape[1]]
        return values[codes(start, stop)] * wide

    return DenseWeight(name, shape, parts, label, scale_kind, decode)
