"""Codes of 4 and 8 bits that are floats: OCP's E2M1 and E4M3, and E8M0 for scales (Microscaling Formats v1.0)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kbit.checkpoint.packed.weight import Blocks, BlockWeight, DenseWeight, PackedTensors, PackedWeight, can_block
from kbit.checkpoint.readers.hf_folder import to_float32
from kbit.formats.quant_format import QuantFormat
from kbit.formats.stored import widened
from kbit.host.errors import CheckpointError

_HALF = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = np.array([*_HALF, *(-value for value in _HALF)], dtype=np.float32)

Scales = Callable[[int, int], NDArray[Any]]


def e4m3() -> NDArray[np.float32]:
    """The values of E4M3's codes (256,), 0 for the two that are NaN: whoever reads codes refuses those."""
    values: NDArray[np.float32] = to_float32(np.arange(256, dtype=np.uint8), "F8_E4M3").copy()
    values[np.isnan(values)] = 0
    return values


def e8m0(codes: NDArray[np.uint8]) -> NDArray[np.uint16]:
    """Scales of E8M0, 2^(code - 127), as patterns of bf16: exact; 255, which is NaN, becomes an infinity."""
    patterns: NDArray[np.uint16] = codes.astype(np.uint16) << np.uint16(7)
    patterns[codes == 0] = 0x40  # 2^-127 is subnormal
    return patterns


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


def nibbles(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Bytes (R, K / 2) as codes (R, K), the low half first."""
    codes = np.empty((*data.shape, 2), dtype=np.uint8)
    np.bitwise_and(data, 15, out=codes[..., 0])
    np.right_shift(data, 4, out=codes[..., 1])
    return codes.reshape(data.shape[0], -1)


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
) -> PackedWeight:
    """A weight of E4M3 codes: see four_bits. `block` is 0 where a row shares a scale.

    The libraries round the products to the type of the scales; packed they are not rounded but to float32.

    Raises (on reading):
        CheckpointError: a code is NaN.
    """
    info = tensors.expect(name, ("F8_E4M3",))
    shape = (info.shape[0], info.shape[1])
    block = 0 if block == shape[1] else block

    def codes(start: int, stop: int) -> NDArray[np.uint8]:
        found: NDArray[np.uint8] = tensors.read(name, start, stop)
        refuse_nan(tensors, name, found)
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
