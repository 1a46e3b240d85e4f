"""Matrices, activations and products for the tests of the packed matmul."""

from __future__ import annotations

import numpy as np
import torch

from kbit import _native
from kbit.backends.cpu.weight import prepare
from kbit.formats.planes_codec import PlanesTensor
from kbit.formats.quant_format import QuantFormat
from kbit.formats.quant_tensor import QuantTensor


def weights(format: str, rows: int, columns: int) -> QuantTensor:
    generator = torch.Generator().manual_seed(rows * columns)
    whole = torch.randn(rows, columns, generator=generator)
    return QuantFormat.parse(format).encode(lambda start, stop: whole[start:stop], (rows, columns))


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


def int8_bound(weight: QuantTensor, x: torch.Tensor) -> np.ndarray:
    """What int8 compute may differ from exact: x is rounded to 1/254 of its segment's largest value. The codebook is
    rounded to int8 steps with the least squared error, which is at most that of 127 steps, (peak / 254)^2 per level, and
    one level has at most all of it; from 6 bits on to 1/250 of 1/126."""
    block = weight.format.block_size or 64
    segment = next(s for s in (64, 32, 16) if block % s == 0)
    columns = x.shape[1]
    padded = torch.nn.functional.pad(x, (0, -columns % segment)).view(x.shape[0], -1, segment)
    x_error = (padded.abs().amax(-1) / 254 * 1.001).repeat_interleave(segment, dim=1)[:, :columns].double()
    values = weight.dequantize().double().abs()
    bits, peak = weight.format.bits, float(weight.codebook.abs().max())
    level_error = peak / 254 * 2 ** (bits / 2) if bits < 6 else peak / 126 / 500
    scales = (
        PlanesTensor.of(weight)
        .scales.double()
        .repeat_interleave(weight.format.block_size or columns, dim=1)[:, :columns]
    )
    w_error = scales.abs() * level_error * 1.001
    return (x_error @ (values + w_error).T + x.double().abs() @ w_error.T).numpy()
