"""MXFP4 as gpt-oss's files have it: 4-bit floats in blocks of 32, a power of two for each (OCP Microscaling v1.0).

A stack of matrices (E, N, K) is two tensors: `*_blocks`, uint8 (E, N, K / 32, 16), two E2M1 codes a byte, that of the
even column in the low half; and `*_scales`, uint8 (E, N, K / 32), s standing for 2^(s - 127). kbit's float4e2m1 has the
same codes, and bfloat16 holds the scales exactly, so nothing is rounded: with the grid's own numbers as codebook.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from kbit.checkpoint.readers.safetensors_file import StoredTensor
from kbit.host.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kbit.formats.stored import StoredMatrix

BLOCKS, SCALES = "_blocks", "_scales"
# What the tensors are called (`TensorInfo.stored_as`), and the format that one of their matrices has.
STORED_AS, FORMAT = "MXFP4", "float4e2m1-b32-bf16"
_BLOCK, _BYTES, _NO_NUMBER = 32, 16, 255


def stacks(stored: Mapping[str, StoredTensor], where: str) -> dict[str, tuple[int, int, int]]:
    """The stacks among a checkpoint's tensors: their shapes (E, N, K), by name without the ending.

    Raises:
        CheckpointError: blocks without their scales, or of other shapes.
    """
    found = {}
    for name, tensor in stored.items():
        if not name.endswith(BLOCKS) or tensor.dtype != "U8":
            continue
        whole = name.removesuffix(BLOCKS)
        scales = stored.get(whole + SCALES)
        if scales is None:
            raise CheckpointError(f"{where}: {whole}{SCALES} is missing; download the model again")
        shape = tensor.shape
        if len(shape) != 4 or shape[3] != _BYTES or scales.shape != shape[:3] or scales.dtype != "U8":
            raise CheckpointError(
                f"{where}: {name} {shape} and {whole}{SCALES} {scales.dtype} {scales.shape} are no MXFP4 blocks; they "
                f"should be (experts, rows, blocks, {_BYTES}) and (experts, rows, blocks), bytes"
            )
        found[whole] = (shape[0], shape[1], _BLOCK * shape[2])
    return found


def codes_of(blocks: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Codes (N, K) of blocks (N, K / 32, 16)."""
    from kbit.formats.microscaling import nibbles

    return nibbles(blocks).reshape(len(blocks), -1)


def matrix_of(blocks: NDArray[np.uint8], scales: NDArray[np.uint8], name: str) -> StoredMatrix:
    """One matrix, packed.

    Args:
        blocks: (N, K / 32, 16).
        scales: (N, K / 32).
        name: for errors.

    Raises:
        CheckpointError: a scale that is no number.
    """
    from kbit.formats.microscaling import E2M1
    from kbit.formats.quant_format import QuantFormat
    from kbit.formats.stored_planes import RowsPacker

    rows, columns = scales.shape[0], _BLOCK * scales.shape[1]
    packer = RowsPacker(QuantFormat.parse(FORMAT), (rows, columns))
    packer.put(0, codes_of(blocks), _patterns(scales, name), None)
    return packer.matrix(E2M1)


def values_of(blocks: NDArray[np.uint8], scales: NDArray[np.uint8], name: str) -> NDArray[np.float32]:
    """The numbers (N, K) that blocks stand for; arguments and errors as of `matrix_of`."""
    import numpy as np

    from kbit.formats.microscaling import E2M1
    from kbit.formats.stored import widened

    factors = widened(_patterns(scales, name), "bf16")
    values: NDArray[np.float32] = E2M1[codes_of(blocks)] * np.repeat(factors, _BLOCK, axis=1)
    return values


def _patterns(scales: NDArray[np.uint8], name: str) -> NDArray[np.uint16]:
    """2^(s - 127) in bfloat16."""
    from kbit.formats.microscaling import e8m0

    if bool((scales == _NO_NUMBER).any()):
        raise CheckpointError(f"{name}{SCALES} holds {_NO_NUMBER}, which is no number: the file is damaged")
    return e8m0(scales)
