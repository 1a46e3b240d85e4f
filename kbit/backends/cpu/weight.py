"""NativeWeight: a matrix in the layout the native kernels read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kbit import _native
from kbit.formats.codec import no_kernel
from kbit.formats.outlier_weights import PLACES, VALUES
from kbit.formats.quant_format import plane_widths
from kbit.formats.stored import AnyStored, DenseMatrix, StoredMatrix, widened
from kbit.formats.stored_nested import StoredNested
from kbit.formats.stored_planes import StoredPlanes
from kbit.formats.trellis import TrellisFormat, integer_codes
from kbit.graph.ops import Vector, Weight

if TYPE_CHECKING:
    import torch

    from kbit._native import Context, Matrix
    from kbit.formats.quant_tensor import QuantTensor


@dataclass(frozen=True, eq=False)
class NativeWeight(Weight):
    """A prepared matrix.

    Attributes:
        matrix: the native object, which owns its memory.
    """

    matrix: Matrix

    @property
    def shape(self) -> tuple[int, int]:
        return (self.matrix.rows, self.matrix.columns)

    @property
    def nbytes(self) -> int:
        return self.matrix.nbytes


def native_matrix(weight: Weight) -> Matrix:
    """The native object of a weight.

    Raises:
        TypeError: another backend prepared it.
    """
    if not isinstance(weight, NativeWeight):
        raise TypeError(f"{type(weight).__name__} was prepared by another backend")
    return weight.matrix


def native_vector(vector: Vector) -> NDArray[np.float32]:
    """A norm's weight or a bias (N,) as programs take it.

    Raises:
        TypeError: another backend prepared it.
    """
    if not isinstance(vector, np.ndarray):
        raise TypeError(f"{type(vector).__name__} was prepared by another backend")
    return vector


def prepare(weight: torch.Tensor | QuantTensor, context: Context) -> NativeWeight:
    """`prepare_stored` for a matrix in torch. Dense types other than fp16, bf16 and fp32 become fp32."""
    import torch

    if isinstance(weight, torch.Tensor):
        kinds = {torch.float16: "fp16", torch.bfloat16: "bf16"}
        values = weight if weight.dtype in kinds else weight.float()
        return prepare_stored(DenseMatrix(_bits(values), kinds.get(values.dtype, "fp32")), context)
    parts = {name: _bits(array) for name, array in weight.stored.items()}
    return prepare_stored(StoredMatrix(weight.format, weight.shape, parts, _bits(weight.codebook)), context)


def prepare_stored(stored: AnyStored, context: Context) -> NativeWeight:
    """A matrix (N, K) in the native layout: codes and scales as they are stored, dense values in their own type.

    Double-quantized scales become fp32: their products are formed here, and not at every use.

    Raises:
        UnsupportedError: a codec without native kernels.
    """
    if isinstance(stored, DenseMatrix):
        return NativeWeight(_native.Matrix.dense(stored.values, stored.kind, context))
    make = CODECS.get(stored.format.family)
    if make is None:
        raise no_kernel("native", stored.format, CODECS)
    return NativeWeight(make(stored, context))


def _planes(stored: StoredMatrix, context: Context) -> Matrix:
    """Planes, scales and codebook (kernels/cpu/codecs/matrix_storage.h)."""
    matrix = StoredPlanes.of(stored)
    format = matrix.format
    scales, kind = matrix.kernel_scales("scales")
    assert scales is not None
    made = _native.Matrix.quantized(
        matrix.planes,
        format.bits,
        stored.shape[1],
        format.block_size,
        scales,
        matrix.kernel_scales("offsets")[0],
        kind,
        stored.codebook,
        context,
    )
    return _with_outliers(made, stored)


def _nested(stored: StoredMatrix, context: Context) -> Matrix:
    """The widest width of a nested matrix."""
    return nested_matrix(StoredNested.of(stored), stored.format.bits, context)


def nested_matrix(matrix: StoredNested, width: int, context: Context) -> Matrix:
    """A nested matrix at a width: planes apart from 3 bits on (kernels/cpu/codecs/matrix.h), and the width's scales."""
    format = matrix.format
    return _native.Matrix.quantized(
        matrix.planes(width),
        width,
        matrix.shape[1],
        format.block_size,
        matrix.kernel_scales(width),
        None,
        format.scale_dtype,
        np.ascontiguousarray(matrix.levels(width)),
        context,
        apart=width > 2,
    )


def _trellis(stored: StoredMatrix, context: Context) -> Matrix:
    """Tiles, scales of rows and signs (kernels/cpu/codecs/matrix.h); integers as bit planes of rotated columns."""
    format, columns = stored.format, stored.shape[1]
    assert isinstance(format, TrellisFormat)
    parts, mixed = stored.parts, format.columns_mixed(columns)
    if format.code != "int":
        matrix = _native.Matrix.trellis(
            parts["codes"], format.bits, format.code, format.window, columns, parts["scales"], parts["signs"], mixed,
            context, format.half,
        )  # fmt: skip
        return _with_outliers(matrix, stored)
    codes, planes, shift = integer_codes(parts["codes"], format.bits, stored.shape[0]), [], 0
    for width in plane_widths(format.bits):
        plane = np.empty((len(codes), -(-codes.shape[1] * width // 8)), dtype=np.uint8)
        _native.pack_plane(codes, width, shift, plane)
        planes.append(plane)
        shift += width
    levels = np.arange(1 << format.bits, dtype=np.float32) - np.float32(1 << format.bits - 1)
    matrix = _native.Matrix.quantized(
        planes, format.bits, columns, 0, parts["scales"], None, "fp16", levels * np.float32(format.step), context,
        parts["signs"], mixed,
    )  # fmt: skip
    return _with_outliers(matrix, stored)


def _with_outliers(matrix: Matrix, stored: StoredMatrix) -> Matrix:
    """The matrix with those weights that are kept apart from its codes."""
    if VALUES in stored.parts:
        values = widened(stored.parts[VALUES], "fp16")
        rows, columns = np.divmod(stored.parts[PLACES][values != 0], np.int32(stored.shape[1]))
        matrix.keep_apart(rows, columns, values[values != 0])
    return matrix


# How a matrix of each codec gets into the native layout, by family.
CODECS: dict[str, Callable[[StoredMatrix, Context], Matrix]] = {
    "planes": _planes,
    "trellis": _trellis,
    "nested": _nested,
}


def _bits(values: torch.Tensor) -> NDArray[Any]:
    """The same memory where possible, as numpy; 16-bit floats as their bit patterns, since numpy has no bfloat16."""
    import torch

    values = values.detach().contiguous()
    if values.dtype in (torch.float16, torch.bfloat16):
        values = values.view(torch.uint16)
    array: NDArray[Any] = values.numpy()
    return array
