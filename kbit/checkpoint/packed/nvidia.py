"""Weights packed by NVIDIA's ModelOpt (FP8, NVFP4) and by FBGEMM (fp8).

FP8: `weight` e4m3, `weight_scale` float32, one for the matrix (ModelOpt) or a row (FBGEMM). NVFP4: `weight` uint8
(N, K / 2), `weight_scale` e4m3 (N, K / 16), and `weight_scale_2` float32 for the matrix, which multiplies (ModelOpt,
torch/export and quantization/qtensor/nvfp4_tensor.py). Products are held in float32, unrounded.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kbit.checkpoint.packed import small_floats
from kbit.checkpoint.packed.weight import PackedTensors, PackedWeight
from kbit.formats.microscaling import e4m3
from kbit.host.errors import CheckpointError, UnsupportedError

_ALGORITHMS = ("FP8", "NVFP4")
_NVFP4_BLOCK = 16


def find(tensors: PackedTensors) -> list[PackedWeight]:
    """The packed weights of a folder.

    Raises:
        UnsupportedError: an algorithm that kbit does not read; the line names it.
        CheckpointError: tensors that do not fit each other.
    """
    section = tensors.section
    own = section.get("quantization")  # of hf_quant_config.json
    algorithm = (own if isinstance(own, dict) else section).get("quant_algo")
    if algorithm not in (None, *_ALGORITHMS):
        raise UnsupportedError(
            f"{tensors.path}: quant_algo {str(algorithm)[:40]!r}: of ModelOpt's kbit reads {' and '.join(_ALGORITHMS)}"
            "; use the original 16-bit checkpoint"
        )
    label = "FBGEMM" if section.get("quant_method") == "fbgemm_fp8" else "ModelOpt"
    found: list[PackedWeight] = []
    for name in tensors.names:
        if name.endswith(".weight") and f"{name}_scale" in tensors:
            dtype = tensors.info(name).dtype
            if dtype == "F8_E4M3":
                found.append(_fp8(tensors, name, f"{label} fp8"))
            elif dtype == "U8":
                found.append(_nvfp4(tensors, name))
    return found


def _fp8(tensors: PackedTensors, name: str, label: str) -> PackedWeight:
    shape = _matrix(tensors, name)
    scale = f"{name}_scale"
    single = tensors.expect(scale, ("F32", "BF16", "F16"), (), (1,), (shape[0],), (shape[0], 1)).numel == 1

    def scales(start: int, stop: int) -> NDArray[np.float32]:
        if single:
            return np.full((stop - start, 1), tensors.floats(scale).reshape(-1)[0], dtype=np.float32)
        return tensors.floats(scale, start, stop).reshape(-1, 1)

    return small_floats.eight_bits(tensors, name, (name, scale), label, block=0, scale_kind="fp32", scales=scales)


def _nvfp4(tensors: PackedTensors, name: str) -> PackedWeight:
    rows, half = _matrix(tensors, name)
    scale, whole = f"{name}_scale", f"{name}_scale_2"
    tensors.expect(scale, ("F8_E4M3",), (rows, 2 * half // _NVFP4_BLOCK))
    tensors.expect(whole, ("F32",), (), (1,))

    def scales(start: int, stop: int) -> NDArray[np.float32]:
        own: NDArray[np.float32] = e4m3()[tensors.read(scale, start, stop)]
        multiplied: NDArray[np.float32] = own * tensors.floats(whole).reshape(-1)[0]
        return multiplied

    return small_floats.four_bits(
        tensors, name, name, (name, scale, whole), "ModelOpt nvfp4", block=_NVFP4_BLOCK, scale_kind="fp32",
        scales=scales,
    )  # fmt: skip


def _matrix(tensors: PackedTensors, name: str) -> tuple[int, int]:
    """The shape of a tensor that must be a matrix.

    Raises:
        CheckpointError: it is none.
    """
    shape = tensors.info(name).shape
    if len(shape) != 2:
        raise CheckpointError(f"{tensors.file(name)}: {name} of shape {shape}: kbit reads packed matrices only")
    return shape[0], shape[1]
