"""Weights packed by MLX (mlx-lm): `weight` uint32 (N, words), a row a stream of codes; `scales` (N, K / group_size).

Mode "affine" (2, 3, 4, 5, 6 and 8 bits) has `biases` beside the scales: value = scale * code + bias. MLX computes it
in the type of the scales and rounds the product before the sum, in `dequantize` as in `quantized_matmul` on a CPU; no
block format says that, so these are held dequantized. Modes mxfp4, mxfp8 and nvfp4 are OCP's and NVIDIA's floats.

config.json has `quantization`, the same again as `quantization_config`: group_size, bits, mode, and entries by the
names of layers which differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kbit.checkpoint.packed import bits as unpack
from kbit.checkpoint.packed import small_floats
from kbit.checkpoint.packed.levels import Levels, LevelWeight, pays
from kbit.checkpoint.packed.weight import Blocks, BlockWeight, DenseWeight, PackedTensors, PackedWeight
from kbit.formats.microscaling import E2M1, e4m3, e8m0
from kbit.formats.quant_format import QuantFormat
from kbit.formats.stored import rounded_values
from kbit.host.errors import CheckpointError, UnsupportedError

_AFFINE_BITS = (2, 3, 4, 5, 6, 8)
# Bits and weights of a block of the modes that are floats.
_MODES = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}


def find(tensors: PackedTensors) -> list[PackedWeight]:
    """The packed weights of a folder.

    Raises:
        UnsupportedError: an option that kbit does not read; the line names it.
        CheckpointError: tensors that do not fit each other or the configuration.
    """
    return [_weight(tensors, name.removesuffix(".scales")) for name in tensors.names if name.endswith(".scales")]


def _weight(tensors: PackedTensors, module: str) -> PackedWeight:
    own = tensors.section.get(module)
    where = f"{tensors.path}/config.json"
    settings: Mapping[str, Any] = own if isinstance(own, dict) else tensors.section
    mode = settings.get("mode", "affine")
    bits, group = settings.get("bits"), settings.get("group_size")
    if mode not in ("affine", *_MODES):
        raise UnsupportedError(
            f"{where}: mode {str(mode)[:40]!r} of MLX's quantization: kbit reads affine, {', '.join(_MODES)}; use the "
            "original 16-bit checkpoint"
        )
    if f"{module}.global_scale" in tensors:
        raise UnsupportedError(
            f"{tensors.path}: {module}.global_scale: kbit reads MLX's weights without; use the original "
            "16-bit checkpoint"
        )
    allowed = _AFFINE_BITS if mode == "affine" else (_MODES[mode][0],)
    if type(bits) is not int or type(group) is not int or bits not in allowed or group < 1:
        raise CheckpointError(
            f"{where}: bits {str(bits)[:20]} and group_size {str(group)[:20]} of MLX's quantization of {module}, mode "
            f"{mode}: kbit reads {', '.join(map(str, allowed))} bits in groups of any size"
        )
    words = tensors.expect(f"{module}.weight", ("U32",)).shape
    columns = words[1] * 32 // bits if len(words) == 2 else 0
    if columns == 0 or columns % group or words[1] * 32 % bits:
        raise CheckpointError(
            f"{tensors.file(f'{module}.weight')}: {module}.weight of shape {words} does not hold rows of {bits} bits "
            f"in groups of {group}: {where} is another model's, or the file is damaged"
        )
    shape = (words[0], columns)
    return _affine(tensors, module, shape, bits, group) if mode == "affine" else _floats(tensors, module, shape, mode)


def _affine(tensors: PackedTensors, module: str, shape: tuple[int, int], bits: int, group: int) -> PackedWeight:
    name, scales, biases = f"{module}.weight", f"{module}.scales", f"{module}.biases"
    wanted = (shape[0], shape[1] // group)
    kind = tensors.kind(scales)
    tensors.expect(scales, ("F16", "BF16", "F32"), wanted)
    tensors.expect(biases, (tensors.info(scales).dtype,), wanted)

    parts, label = (name, scales, biases), f"MLX {bits}-bit"
    if pays(bits, group):
        steps = np.arange(1 << bits, dtype=np.float32)

        def read(start: int, stop: int) -> Levels:
            values = steps * tensors.floats(scales, start, stop)[..., None]
            values = rounded_values(values, kind)
            values += tensors.floats(biases, start, stop)[..., None]
            return Levels(unpack.stream(tensors.read(name, start, stop), bits), values)

        return LevelWeight(name, shape, parts, label, kind, read)

    def decode(start: int, stop: int) -> NDArray[np.float32]:
        rows = stop - start
        codes = unpack.stream(tensors.read(name, start, stop), bits).reshape(rows, -1, group)
        values = codes.astype(np.float32)
        values *= tensors.floats(scales, start, stop)[..., None]
        values = rounded_values(values, kind)
        values += tensors.floats(biases, start, stop)[..., None]
        return values.reshape(rows, -1)

    return DenseWeight(name, shape, parts, label, kind, decode)


def _floats(tensors: PackedTensors, module: str, shape: tuple[int, int], mode: str) -> PackedWeight:
    name, scale = f"{module}.weight", f"{module}.scales"
    bits, block = _MODES[mode]
    tensors.expect(scale, ("U8",), (shape[0], shape[1] // block))
    kind = "fp32" if mode == "nvfp4" else "bf16"
    values = E2M1 if bits == 4 else e4m3()

    def read(start: int, stop: int) -> Blocks:
        codes = unpack.stream(tensors.read(name, start, stop), bits)
        if bits == 8:
            small_floats.refuse_nan(tensors, name, codes)
        own = tensors.read(scale, start, stop)
        return Blocks(codes, e4m3()[own] if mode == "nvfp4" else e8m0(own))

    format = QuantFormat("float", bits, block, exponent_bits=2 if bits == 4 else 4, grid="ocp", scale_dtype=kind)
    return BlockWeight(name, shape, (name, scale), f"MLX {mode}", format, values, read)
