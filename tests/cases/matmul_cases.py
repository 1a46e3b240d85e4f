"""Matrices, activations and products for the tests of the packed matmul."""

from __future__ import annotations

import numpy as np
import torch

from kbit import _native
from kbit.backends.cpu.weight import prepare
from kbit.formats.blockwise import quantize_blockwise
from kbit.formats.quant_format import QuantFormat
from kbit.formats.quant_tensor import QuantTensor


def weights(format: str, rows: int, columns: int) -> QuantTensor:
    generator = torch.Generator().manual_seed(rows * columns)
    return quantize_blockwise(torch.randn(rows, columns, generator=generator), QuantFormat.parse(format))


def inputs(rows: int, columns: int) -> torch.Tensor:
    """Activations with a few large features, as real ones have."""
    generator = torch.Generator().manual_seed(rows + columns)
    x = torch.randn(rows, columns, generator=generator)
    x[:, :: max(1, columns // 3)] *= 20
    return x


def multiply(context: _native.Context, weight: QuantTensor | torch.Tensor, x: torch.Tensor, compute: str) -> np.ndarray:
    program = _native.Program(context, compute)
    hidden = program.buffer(x.shape[1])
    program.finish(hidden)
    program.head(prepare(weight, context).matrix, None, 0.0)
    out = np.full((x.shape[0], weight.shape[0]), np.nan, dtype=np.float32)
    program.logits(x.numpy(), out)
    return out


def exact(weight: QuantTensor | torch.Tensor, x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """x W^T in float64, and |x| |W|^T, which bounds what rounding can do."""
    values = (weight.dequantize() if isinstance(weight, QuantTensor) else weight).double()
    return (x.double() @ values.T).numpy(), (x.double().abs() @ values.abs().T).numpy()
