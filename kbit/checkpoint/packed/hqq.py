"""Weights packed by HQQ, with groups along the rows (axis 1).

The matrix is cut into groups of `group_size`, which are the rows of a table of codes; that is packed by slices: of
4 bits the first half of the table in the high halves of the bytes, the second in the low ones; 2 bits in quarters, 1
bit in eighths, 3 bits in tenths of int32 (hqq/core/bitpack.py). Settings are tensors beside it. value = (code - zero) *
scale in `compute_dtype`, rounded after the difference and after the product (hqq/core/quantize.py,
Quantizer.dequantize): no block format says that, so weights are held dequantized.
"""

from __future__ import annotations

from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kbit.checkpoint.packed.bits import sliced
from kbit.checkpoint.packed.levels import Levels, LevelWeight, pays
from kbit.checkpoint.packed.weight import DenseWeight, PackedTensors, PackedWeight
from kbit.formats.stored import rounded_values
from kbit.host.errors import CheckpointError, UnsupportedError

# Packing -> bits, slices, type of the words.
_PACKINGS = {
    "8bit_u8": (8, 1, "U8"),
    "4bit_u8": (4, 2, "U8"),
    "3bit_32": (3, 10, "I32"),
    "2bit_u8": (2, 4, "U8"),
    "1bit_u8": (1, 8, "U8"),
}
_KINDS = {"torch.float16": "fp16", "torch.bfloat16": "bf16", "torch.float32": "fp32"}
# What HQQ stores of a layer besides codes, scale and zero; some of these say nothing about the values.
_SETTINGS = (
    "nbits", "group_size", "shape", "axis", "packing", "compute_dtype", "view_as_float", "unpack_view_dtype",
    "quant_scale", "quant_zero", "offload_meta", "encoded_state_dict", "stores_quant_config", "channel_wise",
    "optimize", "round_zero",
)  # fmt: skip


def find(tensors: PackedTensors) -> list[PackedWeight]:
    """The packed weights of a folder.

    Raises:
        UnsupportedError: an option that kbit does not read; the line names it.
        CheckpointError: tensors that do not fit each other.
    """
    return [_weight(tensors, name.removesuffix("W_q")) for name in tensors.names if name.endswith(".W_q")]


def _weight(tensors: PackedTensors, module: str) -> PackedWeight:
    packed, scale, zero = (f"{module}{end}" for end in ("W_q", "scale", "zero"))
    parts = (packed, scale, zero, *(f"{module}{end}" for end in _SETTINGS if f"{module}{end}" in tensors))
    for key in ("quant_scale", "quant_zero", "view_as_float"):
        if f"{module}{key}" in tensors and tensors.read(f"{module}{key}").any():
            raise _unsupported(tensors, f"{module}{key}", "is set")
    if _integer(tensors, f"{module}axis") != 1:
        raise _unsupported(tensors, f"{module}axis", "is 0: groups across rows")
    packing, kind = _text(tensors, f"{module}packing"), _text(tensors, f"{module}compute_dtype")
    if packing not in _PACKINGS or kind not in _KINDS:
        key, value = ("packing", packing) if packing not in _PACKINGS else ("compute_dtype", kind)
        raise _unsupported(tensors, f"{module}{key}", f"is {value[:40]!r}")
    bits, slices, words = _PACKINGS[packing]
    shape = tensors.read(f"{module}shape").tolist() if f"{module}shape" in tensors else []
    group = _integer(tensors, f"{module}group_size")
    if len(shape) != 2 or group < 1 or min(shape) < 1 or shape[1] % group:
        raise CheckpointError(
            f"{tensors.file(packed)}: {module}shape {str(shape)[:40]} and group_size {group} describe no matrix of "
            "whole groups a row; download the model again"
        )
    rows, columns = shape
    per_row = columns // group
    groups = rows * per_row
    step = ceil(groups / slices)
    tensors.expect(packed, (words,), (step, group))
    for name in (scale, zero):
        tensors.kind(name)
        tensors.expect(name, ("F16", "BF16", "F32"), (groups, 1), (groups,))
    dtype = _KINDS[kind]

    def codes_of(start: int, stop: int) -> NDArray[np.uint8]:
        """Codes of rows as (groups, group)."""
        table = tensors.whole(packed, packed)
        return sliced(table, bits, slices, start * per_row, stop * per_row, highest_first=True)

    def terms(start: int, stop: int) -> list[NDArray[np.float32]]:
        """Zeros and scales, (groups, 1)."""
        first, last = start * per_row, stop * per_row
        found = ((name, tensors.floats(name, first, last).reshape(-1, 1)) for name in (zero, scale))
        return [values if tensors.kind(name) == dtype else rounded_values(values, dtype) for name, values in found]

    def decode(start: int, stop: int) -> NDArray[np.float32]:
        zeros, scales = terms(start, stop)
        values = rounded_values(codes_of(start, stop).astype(np.float32) - zeros, dtype) * scales
        found: NDArray[np.float32] = values.reshape(stop - start, columns)
        return found

    def read(start: int, stop: int) -> Levels:
        zeros, scales = terms(start, stop)
        values = rounded_values(np.arange(1 << bits, dtype=np.float32) - zeros, dtype) * scales
        return Levels(codes_of(start, stop).reshape(stop - start, columns), values.reshape(stop - start, per_row, -1))

    name, label = f"{module}weight", f"HQQ {bits}-bit"
    if pays(bits, group):
        return LevelWeight(name, (rows, columns), parts, label, dtype, read)
    return DenseWeight(name, (rows, columns), parts, label, dtype, decode)


def _integer(tensors: PackedTensors, name: str) -> int:
    """A setting that is a number.

    Raises:
        CheckpointError: it is missing, or not one number.
    """
    tensors.expect(name, ("I32", "I64", "U8"), (), (1,))
    return int(tensors.read(name).reshape(-1)[0])


def _text(tensors: PackedTensors, name: str) -> str:
    """A setting that is text: HQQ stores the code of every letter.

    Raises:
        CheckpointError: it is missing, or no text.
    """
    info = tensors.expect(name, ("U8",))
    if len(info.shape) != 1:
        raise CheckpointError(f"{tensors.file(name)}: {name} of shape {info.shape} is no text; get it again")
    data: NDArray[Any] = tensors.read(name)
    return data.tobytes().decode("latin-1")


def _unsupported(tensors: PackedTensors, name: str, what: str) -> UnsupportedError:
    return UnsupportedError(
        f"{tensors.file(name)}: {name} {what}, which kbit does not read in HQQ's weights; use the original "
        "16-bit checkpoint"
    )
