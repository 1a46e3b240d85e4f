"""NativeWeight: a matrix in the layout the native kernels read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from kbit import _native
from kbit.formats.quant_tensor import QuantTensor
from kbit.graph.ops import Vector, Weight

if TYPE_CHECKING:
    from kbit._native import Context, Matrix

_KINDS = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


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
    """A matrix (N, K) in the native layout: codes and scales as they are stored, dense values in their own type.

    Double-quantized scales become fp32: their products are formed here, as `kbit.formats.scales` defines them, and not
    at every use. Dense types other than fp16, bf16 and fp32 become fp32.
    """
    if isinstance(weight, torch.Tensor):
        values = weight if weight.dtype in _KINDS else weight.float()
        return NativeWeight(_native.Matrix.dense(_bits(values), _KINDS[values.dtype], context))
    format = weight.format
    if format.double_quant:
        scales, offsets = weight.scales, weight.offsets
    else:
        scales, offsets = weight.stored["scales"], weight.stored.get("offsets")
    matrix = _native.Matrix.quantized(
        [_bits(plane) for plane in weight.planes],
        format.bits,
        weight.shape[1],
        format.block_size,
        _bits(scales),
        None if offsets is None else _bits(offsets),
        _KINDS[scales.dtype],
        _bits(weight.codebook),
        context,
    )
    return NativeWeight(matrix)


def _bits(values: torch.Tensor) -> NDArray[Any]:
    """The same memory where possible, as numpy; 16-bit floats as their bit patterns, since numpy has no bfloat16."""
    values = values.detach().contiguous()
    if values.dtype in (torch.float16, torch.bfloat16):
        values = values.view(torch.uint16)
    array: NDArray[Any] = values.numpy()
    return array
