"""Formats and helpers that several tests of blockwise quantization share."""

from __future__ import annotations

import torch

from kbit.formats.quant_format import FLOAT_GRIDS, QuantFormat
from kbit.formats.quant_tensor import QuantTensor

BITS = range(2, 9)
UNIT = 2.0**-24  # float32's rounding unit

# All of OCP's splits; of the other grids (which differ in the subnormals and the order of codes) three a width.
FLOATS = [
    f"float{k}e{e}m{k - 1 - e}-{grid}"
    for k in BITS
    for e in range(1, k)
    for grid in FLOAT_GRIDS
    if grid == "ocp" or e in (1, 2, k - 1)
]
# Codebooks that hold -1 and 1: the largest weight of a block comes back as plus or minus the scale itself.
FULL_RANGE = [*(f"{dtype}{k}" for dtype in ("int", "nf") for k in BITS), *FLOATS]
BASES = [
    *FULL_RANGE,
    *(f"{dtype}{k}" for dtype in ("dynamic", "quantile", "lloyd") for k in BITS),
    *(f"int{k}-asym" for k in BITS),
]
# Every way to store scales, and the extremes of block size, on a few data types that differ in what they store.
STORAGE = [
    f"{base}-{block}{scale}"
    for base in ("nf4", "int3-asym", "quantile5", "lloyd2")
    for block in ("b16", "b48", "b4096", "row")
    for scale in ("", "-bf16", "-fp32", "-dq")
]


def normal(rows: int, columns: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale


def parse(text: str) -> QuantFormat:
    return QuantFormat.parse(text)


def bits_of(x: torch.Tensor) -> torch.Tensor:
    """A float32 tensor's bit patterns: -0.0 and 0.0 differ."""
    return x.view(torch.int32)


def assert_same(a: QuantTensor, b: QuantTensor) -> None:
    """Equal to the last stored bit."""
    assert a.format == b.format
    assert a.shape == b.shape
    assert list(a.stored) == list(b.stored)
    for suffix, array in a.stored.items():
        assert array.dtype == b.stored[suffix].dtype
        assert torch.equal(array, b.stored[suffix]), suffix
    assert torch.equal(bits_of(a.codebook), bits_of(b.codebook))
