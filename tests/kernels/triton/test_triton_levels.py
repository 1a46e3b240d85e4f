"""Matrices whose codebook is not their format's own, as GGUF files and other quantizers' have: x W^T and rows of W."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from format_cases import normal
from triton_cases import FP32_UNIT, assert_within, product_bound

triton = pytest.importorskip("triton")

from kbit.checkpoint.gguf.blocks import BLOCK_TYPES  # noqa: E402
from kbit.formats.planes_codec import PlanesTensor  # noqa: E402
from kbit.formats.quant_tensor import QuantTensor  # noqa: E402
from kbit.formats.stored import rounded  # noqa: E402
from kbit.formats.stored_planes import RowsPacker  # noqa: E402
from kbit.kernels import reference  # noqa: E402
from kbit.kernels.triton.codecs.layout import prepare_weight  # noqa: E402
from kbit.kernels.triton.product.gemm import gemm  # noqa: E402
from kbit.kernels.triton.product.gemv import gemv  # noqa: E402
from kbit.kernels.triton.rows.embed import embed  # noqa: E402

ROWS, COLUMNS = 20, 256


def matrix(name: str) -> QuantTensor:
    """Random codes of a GGUF type."""
    block_type = BLOCK_TYPES[name]
    format, rng = block_type.format, np.random.default_rng(3)
    shape = (ROWS, COLUMNS // format.block_size)
    scales = np.exp2(rng.integers(-8, -2, shape)).astype(np.float32)
    offsets = rng.normal(0, 0.1, shape).astype(np.float32) if format.asymmetric else None
    packer = RowsPacker(format, (ROWS, COLUMNS))
    codes = rng.integers(0, 2**format.bits, (ROWS, COLUMNS)).astype(np.uint8)
    kind = format.scale_dtype
    packer.put(0, codes, rounded(scales, kind), None if offsets is None else rounded(offsets, kind))
    return packer.matrix(block_type.codebook).tensor()


@pytest.mark.parametrize("name", BLOCK_TYPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_every_type(device: str, name: str, dtype: torch.dtype) -> None:
    weight = matrix(name)
    prepared = prepare_weight(weight, device, dtype)
    for multiply, tokens in ((gemv, 2), (gemm, 20)):
        x = normal(tokens, COLUMNS, seed=1).to(dtype)
        got = multiply(x.to(device), prepared)
        bound = product_bound(x, weight.dequantize(), dtype, dtype, decoded=6)
        assert_within(got.float(), reference.linear(x, weight), bound)
    # In float32: a level, times its step and its scale, plus an offset.
    values = weight.dequantize()
    assert_within(embed(prepare_weight(weight, device, torch.float32)), values, 4 * FP32_UNIT * bounds(weight))


def bounds(weight: QuantTensor) -> torch.Tensor:
    """The largest number on the way to any value of a matrix."""
    matrix = PlanesTensor.of(weight)
    largest = float(weight.codebook.abs().max()) * matrix.scales.abs().max()
    return largest if matrix.offsets is None else largest + matrix.offsets.abs().max()
