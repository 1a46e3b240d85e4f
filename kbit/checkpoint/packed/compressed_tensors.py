"""Weights packed by compressed-tensors, the library of llm-compressor.

A layer is one of these, told apart by its tensors (compressors/*/base.py of the library):

    pack-quantized   weight_packed int32 (N, words): a row is a stream of codes q + 2^(bits - 1); weight_shape;
                     weight_scale (N, G); weight_zero_point int32 (words, G), packed along the rows; weight_g_idx
    int-quantized    weight int8, weight_scale, weight_zero_point int8
    float-quantized  weight e4m3, weight_scale
    nvfp4            weight_packed uint8 (N, K / 2), weight_scale e4m3 (N, K / 16), weight_global_scale, which divides
    mxfp4, mxfp8     the same or e4m3 with weight_scale uint8 (N, K / 32): 2^(code - 127)

Scales are one for the matrix, a row, a group of columns, or a block of rows and columns. value = (q - zero) * scale,
rounded to the type of the scale (quantization/lifecycle/forward.py, dequantize). Versions before 2026 did not let codes
of 3, 5, 6 and 7 bits cross words; the number of words tells.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kbit.checkpoint.packed import bits as unpack
from kbit.checkpoint.packed import small_floats
from kbit.checkpoint.packed.integer_weight import IntegerRows, integer_weight
from kbit.checkpoint.packed.weight import FLOAT_KINDS, PackedTensors, PackedWeight
from kbit.formats.microscaling import e4m3, e8m0
from kbit.host.errors import CheckpointError, UnsupportedError

_FORMATS = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
    "mixed-precision",
)
_FLOATS = tuple(FLOAT_KINDS)
_NVFP4_BLOCK, _MX_BLOCK = 16, 32


def find(tensors: PackedTensors) -> list[PackedWeight]:
    """The packed weights of a folder.

    Raises:
        UnsupportedError: an option that kbit does not read; the line names it.
        CheckpointError: tensors that do not fit each other or the configuration.
    """
    section = tensors.section
    if section.get("format") not in (None, *_FORMATS):
        raise tensors.refuse("format", f"of compressed-tensors' formats kbit reads {', '.join(_FORMATS)}")
    sparsity = section.get("sparsity_config")
    if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
        raise tensors.refuse("sparsity_config", "kbit reads no sparse weights")
    if section.get("transform_config"):
        raise tensors.refuse("transform_config", "the layers' inputs are transformed, which kbit does not do")
    found: list[PackedWeight] = []
    for name in tensors.names:
        if name.endswith(".weight_packed"):
            module = name.removesuffix("weight_packed")
            found.append(_integers(tensors, module) if tensors.info(name).dtype == "I32" else _fp4(tensors, module))
        elif name.endswith(".weight") and f"{name}_scale" in tensors:
            dtype = tensors.info(name).dtype
            if dtype == "I8":
                found.append(_int8(tensors, name))
            elif dtype == "F8_E4M3":
                found.append(_fp8(tensors, name))
    return found


def schemes(section: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What the configuration says of weights, for each group of layers."""
    groups = section.get("config_groups")
    found = (
        [group.get("weights") for group in groups.values() if isinstance(group, dict)]
        if isinstance(groups, dict)
        else []
    )
    return [weights for weights in found if isinstance(weights, dict)]


class _Scales:
    """The scales of a matrix, whatever shares one.

    Args:
        tensors: of the folder.
        name: of the scales.
        shape: (N, K) of the matrix.
    """

    def __init__(self, tensors: PackedTensors, name: str, shape: tuple[int, int]) -> None:
        self._tensors, self.name, self._rows = tensors, name, shape[0]
        info = tensors.expect(name, (*_FLOATS, "U8", "F8_E4M3", "F8_E8M0"))
        found, (rows, columns) = info.shape, shape
        self._step = 1  # rows that share one
        if info.numel == 1:
            self._step, self.group = rows, 0
        elif found in ((rows,), (rows, 1)):
            self.group = 0
        elif len(found) == 2 and found[0] == rows and columns % found[1] == 0:
            self.group = columns // found[1]
        else:
            blocks = [weights.get("block_structure") for weights in schemes(tensors.section)]
            fits = [
                block
                for block in blocks
                if isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)
                and found == (-(-rows // block[0]), -(-columns // block[1]))
            ]  # fmt: skip
            if not fits:
                raise CheckpointError(
                    f"{tensors.file(name)}: {name} of shape {found} does not fit a matrix of {shape}: config.json is "
                    "another model's, or the file is damaged"
                )
            self._step, self.group = fits[0]
        self.groups = 1 if self.group == 0 else -(-columns // self.group)

    def read(self, start: int, stop: int, name: str | None = None) -> NDArray[Any]:
        """Of rows: (R, G), as stored. `name`: of another tensor of the same shape (zeros)."""
        name = name or self.name
        if self._step == 1:
            return self._tensors.read(name, start, stop).reshape(stop - start, -1)
        every = self._tensors.whole(self.name, name).reshape(-1, self.groups)
        return every[np.arange(start, stop) // self._step]


def _integers(tensors: PackedTensors, module: str) -> PackedWeight:
    """Codes of `bits` bits in words."""
    codes, shape_name = f"{module}weight_packed", f"{module}weight_shape"
    tensors.expect(shape_name, ("I64", "I32"), (2,))
    shape = (int(tensors.read(shape_name)[0]), int(tensors.read(shape_name)[1]))
    words = tensors.expect(codes, ("I32",)).shape
    bits, dense = _width(tensors, codes, words, shape)
    scales = _Scales(tensors, f"{module}weight_scale", shape)
    kind = tensors.kind(scales.name)
    parts: tuple[str, ...] = (codes, shape_name, scales.name)
    zeros, order = f"{module}weight_zero_point", f"{module}weight_g_idx"
    take = unpack.stream if dense else unpack.padded_words
    if zeros in tensors:
        per_word = 32 // bits
        height = -(-shape[0] * bits // 32) if dense else -(-shape[0] // per_word)
        tensors.expect(zeros, ("I32",), (height, scales.groups))
        parts = (*parts, zeros)
    ordered = order in tensors and any(weights.get("actorder") == "group" for weights in schemes(tensors.section))
    if order in tensors:
        tensors.expect(order, ("I32", "I64"), (shape[1],))
        parts = (*parts, order)

    def unpacked(words: NDArray[Any], count: int) -> NDArray[np.uint8]:
        spare = -words.shape[1] % bits if dense else 0  # `stream` takes whole runs of codes
        return take(np.pad(words, ((0, 0), (0, spare))) if spare else words, bits)[:, :count]

    def read(start: int, stop: int) -> IntegerRows:
        found = None
        if zeros in tensors:
            found = unpacked(np.ascontiguousarray(tensors.whole(codes, zeros).T), shape[0]).T[start:stop]
        return IntegerRows(unpacked(tensors.read(codes, start, stop), shape[1]), scales.read(start, stop), found)

    def group_of() -> NDArray[np.intp]:
        groups = tensors.whole(codes, order).astype(np.intp)
        if not 0 <= groups.min() <= groups.max() < scales.groups:
            raise CheckpointError(
                f"{tensors.file(order)}: {order} names groups from {groups.min()} to {groups.max()}, but there are "
                f"{scales.groups}; download the model again"
            )
        return groups

    return integer_weight(
        f"{module}weight",
        shape,
        parts,
        f"compressed-tensors int{bits}",
        bits=bits,
        group=scales.group,
        kind=kind,
        zero=None if zeros in tensors else 2 ** (bits - 1),
        read=read,
        group_of=group_of if ordered and scales.groups > 1 else None,
    )


def _width(tensors: PackedTensors, name: str, words: tuple[int, ...], shape: tuple[int, int]) -> tuple[int, bool]:
    """Bits of the codes in these words, and whether they cross words: of the widths in the configuration the one that
    fits.

    Raises:
        CheckpointError: none does, or several do.
    """
    rows, columns = shape
    widths = sorted(
        {bits for w in schemes(tensors.section) if type(bits := w.get("num_bits")) is int and 1 <= bits <= 8}
    )
    fits = []
    for bits in widths:
        dense, padded = -(-columns * bits // 32), -(-columns // (32 // bits))
        if words in ((rows, dense), (rows, padded)):
            fits.append((bits, words == (rows, dense)))
    if len(fits) != 1:
        raise CheckpointError(
            f"{tensors.file(name)}: {name} of shape {words} holds {rows} x {columns} codes of which width, of num_bits "
            f"{', '.join(map(str, widths)) or 'that are missing'} in config.json, cannot be told"
        )
    return fits[0]


def _int8(tensors: PackedTensors, name: str) -> PackedWeight:
    found = tensors.info(name).shape
    if len(found) != 2:
        raise UnsupportedError(f"{tensors.file(name)}: {name} of shape {found}: kbit reads packed matrices only")
    scales = _Scales(tensors, f"{name}_scale", (found[0], found[1]))
    zeros = f"{name}_zero_point"
    parts: tuple[str, ...] = (name, scales.name)
    if zeros in tensors:
        tensors.expect(zeros, ("I8",), tensors.info(scales.name).shape)
        parts = (*parts, zeros)

    def read(start: int, stop: int) -> IntegerRows:
        codes = tensors.read(name, start, stop).view(np.uint8) ^ np.uint8(128)
        middle = scales.read(start, stop, zeros).astype(np.int16) + 128 if zeros in tensors else None
        return IntegerRows(codes, scales.read(start, stop), middle)

    return integer_weight(
        name,
        (found[0], found[1]),
        parts,
        "compressed-tensors int8",
        bits=8,
        group=scales.group,
        kind=tensors.kind(scales.name),
        zero=None if zeros in tensors else 128,
        read=read,
    )


def _fp8(tensors: PackedTensors, name: str) -> PackedWeight:
    found = tensors.info(name).shape
    if len(found) != 2:
        raise UnsupportedError(f"{tensors.file(name)}: {name} of shape {found}: kbit reads packed matrices only")
    scales = _Scales(tensors, f"{name}_scale", (found[0], found[1]))
    dtype = tensors.info(scales.name).dtype
    parts = (name, scales.name)
    if dtype in ("U8", "F8_E8M0"):
        return small_floats.eight_bits(
            tensors, name, parts, "compressed-tensors mxfp8", block=scales.group, scale_kind="bf16",
            scales=lambda start, stop: e8m0(scales.read(start, stop)),
        )  # fmt: skip
    return small_floats.eight_bits(
        tensors, name, parts, "compressed-tensors fp8", block=scales.group, scale_kind=tensors.kind(scales.name),
        scales=scales.read,
    )  # fmt: skip


def _fp4(tensors: PackedTensors, module: str) -> PackedWeight:
    codes, scale, whole = (f"{module}{end}" for end in ("weight_packed", "weight_scale", "weight_global_scale"))
    name, info = f"{module}weight", tensors.expect(codes, ("U8",))
    if len(info.shape) != 2:
        raise UnsupportedError(f"{tensors.file(codes)}: {codes} of shape {info.shape}: kbit reads packed matrices only")
    rows, columns = info.shape[0], 2 * info.shape[1]
    if whole not in tensors:
        tensors.expect(scale, ("U8", "F8_E8M0"), (rows, columns // _MX_BLOCK))
        return small_floats.four_bits(
            tensors, name, codes, (codes, scale), "compressed-tensors mxfp4", block=_MX_BLOCK, scale_kind="bf16",
            scales=lambda start, stop: e8m0(tensors.read(scale, start, stop)),
        )  # fmt: skip
    tensors.expect(scale, ("F8_E4M3",), (rows, columns // _NVFP4_BLOCK))
    tensors.expect(whole, ("F32",), (1,), ())

    def scales(start: int, stop: int) -> NDArray[np.float32]:
        own: NDArray[np.float32] = e4m3()[tensors.read(scale, start, stop)]
        divided: NDArray[np.float32] = own / tensors.whole(codes, whole).reshape(())
        return divided

    return small_floats.four_bits(
        tensors, name, codes, (codes, scale, whole), "compressed-tensors nvfp4", block=_NVFP4_BLOCK,
        scale_kind="fp32", scales=scales,
    )  # fmt: skip
