"""Matrices and vectors of the reference: tensors as they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kbit.formats.quant_tensor import QuantTensor
from kbit.graph.ops import Vector, Weight


@dataclass(frozen=True, eq=False)
class ReferenceWeight(Weight):
    """A float32 matrix, or a quantized one that is dequantized at every use."""

    data: torch.Tensor | QuantTensor

    @property
    def shape(self) -> tuple[int, int]:
        return (self.data.shape[0], self.data.shape[1])

    @property
    def nbytes(self) -> int:
        if isinstance(self.data, QuantTensor):
            return self.data.nbytes
        return self.data.numel() * self.data.element_size()


def matrix_of(weight: Weight) -> torch.Tensor | QuantTensor:
    """A matrix that this backend prepared."""
    if not isinstance(weight, ReferenceWeight):
        raise TypeError(f"{type(weight).__name__} was prepared by another backend")
    return weight.data


def dequantized(weight: Weight) -> torch.Tensor:
    """A matrix that this backend prepared, as floats."""
    data = matrix_of(weight)
    return data.dequantize() if isinstance(data, QuantTensor) else data


def tensor_of(vector: Vector) -> torch.Tensor:
    """A vector that this backend prepared."""
    if not isinstance(vector, torch.Tensor):
        raise TypeError(f"{type(vector).__name__} was prepared by another backend")
    return vector
