"""Weights packed by bitsandbytes: 4 bits (nf4, fp4) and LLM.int8.

4 bits: `weight` holds two codes a byte, the first in the high half, of the matrix written row after row; the bytes may
have another type. `weight.absmax` is the scale of every `blocksize` weights of that, `weight.quant_map` the 16
values, `weight.quant_state.bitsandbytes__nf4` the rest as JSON in bytes. Where the scales are quantized too, absmax
holds codes of `weight.nested_quant_map`, times `weight.nested_absmax` per 256 of them, plus nested_offset
(functional.py, QuantState and dequantize_4bit). bitsandbytes rounds value x scale to `dtype` of the state; where blocks
lie within rows kbit keeps the codes instead.

LLM.int8: `weight` int8, `SCB` the largest magnitude of every row; value = code * SCB * float32(1 / 127), in this order
(int8_vectorwise_dequant). It is float32 and held so: rounded to 16 bits it would be another.
"""

from __future__ import annotations

import json
from math import gcd, prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kbit.checkpoint.packed.weight import Blocks, BlockWeight, DenseWeight, PackedTensors, PackedWeight, can_block
from kbit.formats.quant_format import QuantFormat
from kbit.host.errors import CheckpointError, UnsupportedError

_STATE = ".quant_state.bitsandbytes__"
_TYPES = {"nf4": ("nf", None), "fp4": ("float", "bnb")}
_DTYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
_OPTIONAL = ("nested_absmax", "nested_quant_map")
# As bitsandbytes writes 1 / 127.
_TO_ONE = np.float32(7.874015718698502e-3)


def find(tensors: PackedTensors) -> list[PackedWeight]:
    """The packed weights of a folder.

    Raises:
        UnsupportedError: a type of codes that kbit does not read; the line names it.
        CheckpointError: tensors that do not fit each other.
    """
    found: list[PackedWeight] = []
    for name in tensors.names:
        weight, state, kind = name.partition(_STATE)
        if state:
            found.append(_FourBits(tensors, weight, name, kind).weight())
        elif name.endswith(".SCB"):
            found.append(_int8(tensors, name.removesuffix("SCB")))
    return found


class _FourBits:
    """One matrix of 4 bits.

    Args:
        tensors: of the folder.
        name: of the weight.
        state: of the tensor with the state.
        kind: "nf4" or "fp4".
    """

    def __init__(self, tensors: PackedTensors, name: str, state: str, kind: str) -> None:
        self._tensors, self._name = tensors, name
        if kind not in _TYPES:
            raise UnsupportedError(
                f"{tensors.file(state)}: {state}: of bitsandbytes' 4-bit types kbit reads {' and '.join(_TYPES)}; use "
                "the original 16-bit checkpoint"
            )
        self._kind = kind
        self._state = _read_state(tensors, state)
        self._where = tensors.file(state)
        shape, block = self._state.get("shape"), self._state.get("blocksize")
        block = block if type(block) is int else 0
        dtype = str(self._state.get("dtype")).removeprefix("torch.")
        numbers = shape if isinstance(shape, list) else []
        if len(numbers) != 2 or not all(type(n) is int and n > 0 for n in [*numbers, block]) or dtype not in _DTYPES:
            raise CheckpointError(
                f"{self._where}: {state} says shape {str(shape)[:40]}, blocksize {str(block)[:20]}, dtype "
                f"{dtype[:20]}, which describe no matrix; download the model again"
            )
        self._shape, self._block, self._dtype = (numbers[0], numbers[1]), block, _DTYPES[dtype]
        count = prod(self._shape)
        self._absmax, self._map = f"{name}.absmax", f"{name}.quant_map"
        blocks = -(-count // self._block)
        if tensors.info(name).nbytes != -(-count // 2) or count % 2 or tensors.info(self._absmax).numel != blocks:
            raise CheckpointError(
                f"{self._where}: {name} and {self._absmax} do not hold {count} codes in blocks of {self._block}; "
                "download the model again"
            )
        tensors.expect(self._map, ("F32",), (16,))
        self._nested = "nested_blocksize" in self._state
        tensors.expect(self._absmax, ("U8",) if self._nested else ("F32",))
        if self._nested:
            tensors.expect(f"{name}.nested_quant_map", ("F32",), (256,))
            nested = -(-blocks // self._nested_number("nested_blocksize", int))
            tensors.expect(f"{name}.nested_absmax", ("F32",), (nested,))
            self._nested_number("nested_offset", float)
        optional = tuple(f"{name}.{end}" for end in _OPTIONAL) if self._nested else ()
        self._parts = (name, self._absmax, self._map, *optional, state)

    def _nested_number(self, key: str, kind: type) -> Any:
        value: Any = self._state.get(key)
        if type(value) not in (int, kind) or (kind is int and value < 1):
            raise CheckpointError(
                f"{self._where}: the state of {self._name} says {key} {str(value)[:40]}; get it again"
            )
        return value

    def weight(self) -> PackedWeight:
        label = f"bitsandbytes {self._kind}" + (", scales in 8 bits" if self._nested else "")
        columns = self._shape[1]
        # Scales of blocks that go on in the next row are repeated for the parts of them that do not.
        part = gcd(self._block, columns)
        codebook = self._tensors.floats(self._map)
        if can_block(part, columns):
            dtype, grid = _TYPES[self._kind]
            format = QuantFormat(dtype, 4, part, grid=grid, scale_dtype="fp32")
            return BlockWeight(self._name, self._shape, self._parts, label, format, codebook, self._read)

        def decode(start: int, stop: int) -> NDArray[np.float32]:
            values = codebook[self._codes(start, stop)]
            at = np.arange(start * columns, stop * columns).reshape(stop - start, columns) // self._block
            values *= self._scales()[at]
            return values

        return DenseWeight(self._name, self._shape, self._parts, label, self._dtype, decode)

    def _read(self, start: int, stop: int) -> Blocks:
        columns = self._shape[1]
        part = gcd(self._block, columns)
        at = np.arange(start * columns, stop * columns, part).reshape(stop - start, -1) // self._block
        return Blocks(self._codes(start, stop), self._scales()[at])

    def _codes(self, start: int, stop: int) -> NDArray[np.uint8]:
        columns = self._shape[1]
        first, last = start * columns // 2, -(-stop * columns // 2)
        info = self._tensors.info(self._name)
        width = info.row_bytes if len(info.shape) else 1
        begin, end = first // width, -(-last // width)
        data = self._tensors.read(self._name, begin, end).reshape(-1).view(np.uint8)
        packed = data[first - begin * width : last - begin * width]
        codes = np.empty((len(packed), 2), dtype=np.uint8)
        np.right_shift(packed, 4, out=codes[:, 0])
        np.bitwise_and(packed, 15, out=codes[:, 1])
        skipped = start * columns - 2 * first
        return codes.reshape(-1)[skipped : skipped + (stop - start) * columns].reshape(stop - start, columns)

    def _scales(self) -> NDArray[np.float32]:
        """Of every block, in the order of the file."""
        return self._tensors.kept(self._name, "scales", self._read_scales)

    def _read_scales(self) -> NDArray[np.float32]:
        absmax: NDArray[Any] = self._tensors.read(self._absmax).reshape(-1)
        if not self._nested:
            return absmax
        # As QuantState does: value of the code, times the scale, plus the offset; each in float32.
        table, factors = (self._tensors.floats(f"{self._name}.{end}") for end in ("nested_quant_map", "nested_absmax"))
        at = np.arange(absmax.size) // self._nested_number("nested_blocksize", int)
        scales: NDArray[np.float32] = table[absmax] * factors[at] + np.float32(self._state["nested_offset"])
        return scales


def _read_state(tensors: PackedTensors, name: str) -> dict[str, Any]:
    tensors.expect(name, ("U8",))
    try:
        state = json.loads(tensors.read(name).tobytes().decode("utf-8"))
    except (UnicodeDecodeError, ValueError, RecursionError):
        state = None
    if not isinstance(state, dict):
        raise CheckpointError(f"{tensors.file(name)}: {name} is no JSON object; download the model again")
    return state


def _int8(tensors: PackedTensors, module: str) -> PackedWeight:
    name, scale, layout = f"{module}weight", f"{module}SCB", f"{module}weight_format"
    shape = tensors.expect(name, ("I8",)).shape
    if len(shape) != 2:
        raise CheckpointError(f"{tensors.file(name)}: {name} has the shape {shape}, not a matrix's")
    tensors.expect(scale, ("F32",), (shape[0],), (shape[0], 1))
    parts: tuple[str, ...] = (name, scale)
    if layout in tensors:
        # "row" is 0 of bitsandbytes' layouts; the others were for GPUs that its versions since 0.45 do not serve.
        if tensors.read(layout).any():
            raise UnsupportedError(
                f"{tensors.file(layout)}: {layout}: the codes are rearranged for one kind of GPU; load the model with "
                "bitsandbytes 0.44 and save it again, or use the original 16-bit checkpoint"
            )
        parts = (*parts, layout)

    def decode(start: int, stop: int) -> NDArray[np.float32]:
        codes = tensors.read(name, start, stop).view(np.int8).astype(np.float32)
        values: NDArray[np.float32] = codes * tensors.floats(scale, start, stop).reshape(-1, 1) * _TO_ONE
        return values

    return DenseWeight(name, (shape[0], shape[1]), parts, "bitsandbytes int8", "fp32", decode)
