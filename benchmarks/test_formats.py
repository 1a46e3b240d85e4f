"""Speed of the formats layer: bit planes, quantization, dequantization. Nothing is asserted about time.

extra_info of every benchmark holds the rates: GB/s of codes and planes read and written, the share of a plain memory
copy of as many bytes on this machine, or millions of weights and MB of float32 weights a second.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kbit.formats.blockwise import quantize_blockwise
from kbit.formats.planes import pack, pack_plane_torch, unpack, unpack_plane_torch
from kbit.formats.quant_format import QuantFormat, plane_widths

pytestmark = pytest.mark.full  # not of a plain `pytest benchmarks/`

ROWS, COLUMNS = 1024, 4096  # 4 MiB of codes: beyond a second-level cache
ROUNDS = 5


def pack_torch(codes: torch.Tensor, bits: int) -> list[torch.Tensor]:
    planes, shift = [], 0
    for width in plane_widths(bits):
        planes.append(pack_plane_torch(codes, width, shift))
        shift += width
    return planes


def unpack_torch(planes: tuple[torch.Tensor, ...], bits: int, columns: int) -> torch.Tensor:
    codes, shift = torch.zeros((planes[0].shape[0], columns), dtype=torch.uint8), 0
    for width, plane in zip(plane_widths(bits), planes, strict=True):
        codes |= unpack_plane_torch(plane, width, shift, columns)
        shift += width
    return codes


def copy_seconds(nbytes: int) -> float:
    """Best time to copy nbytes // 2 bytes to a new tensor: what packing reads, writes and allocates, without the work.

    The buffers fit a third-level cache, here as there.
    """
    source = torch.ones(nbytes // 2, dtype=torch.uint8)  # zeros would be one page, mapped many times
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        source.clone()
        best = min(best, time.perf_counter() - start)
    return best


def measure(benchmark: Any, work: Callable[[], object]) -> float | None:
    """Run the benchmark; the best time in seconds, or None with --benchmark-disable."""
    benchmark.pedantic(work, rounds=ROUNDS, warmup_rounds=1)
    return None if benchmark.disabled else float(benchmark.stats.stats.min)


def report_bytes(benchmark: Any, seconds: float | None, nbytes: int) -> None:
    if seconds is not None:
        benchmark.extra_info["GB_per_s"] = round(nbytes / seconds / 1e9, 2)
        benchmark.extra_info["share_of_memcpy"] = round(copy_seconds(nbytes) / seconds, 3)


@pytest.fixture(scope="module")
def random_bytes() -> torch.Tensor:
    return torch.randint(0, 256, (ROWS, COLUMNS), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("how", ["native", "torch"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_pack(benchmark: Any, bits: int, how: str, random_bytes: torch.Tensor) -> None:
    benchmark.group = f"pack {bits} bits"
    codes = random_bytes >> (8 - bits)
    function: Callable[[torch.Tensor, int], object] = pack if how == "native" else pack_torch
    seconds = measure(benchmark, lambda: function(codes, bits))
    report_bytes(benchmark, seconds, codes.numel() * (8 + bits) // 8)


@pytest.mark.parametrize("how", ["native", "torch"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_unpack(benchmark: Any, bits: int, how: str, random_bytes: torch.Tensor) -> None:
    benchmark.group = f"unpack {bits} bits"
    codes = random_bytes >> (8 - bits)
    planes = pack(codes, bits)
    function: Callable[..., torch.Tensor] = unpack if how == "native" else unpack_torch
    assert torch.equal(function(planes, bits, COLUMNS), codes)
    seconds = measure(benchmark, lambda: function(planes, bits, COLUMNS))
    report_bytes(benchmark, seconds, codes.numel() * (8 + bits) // 8)


FORMATS = [
    "int4-b64",
    "int4-b64-asym",
    "int3-b128",
    "int8-row",
    "float4e2m1-b64",
    "fp4-b64",
    "dynamic8-b256",
    "quantile4-b64",
    "nf2-b64",
    "nf3-b64",
    "nf4-b64",
    "nf4-b64-dq",
    "nf5-b64",
    "nf8-b64",
    "lloyd3-b64",
    "lloyd8-b64",
]


@pytest.fixture(scope="module")
def weights() -> torch.Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))


def report_weights(benchmark: Any, seconds: float | None, text: str) -> None:
    if seconds is not None:
        benchmark.extra_info["MB_per_s_of_float32"] = round(4 * ROWS * COLUMNS / seconds / 1e6)
        benchmark.extra_info["million_weights_per_s"] = round(ROWS * COLUMNS / seconds / 1e6, 1)
        benchmark.extra_info["bits_per_weight"] = round(QuantFormat.parse(text).bits_per_weight(ROWS, COLUMNS), 4)


@pytest.mark.parametrize("text", FORMATS)
def test_quantize(benchmark: Any, text: str, weights: torch.Tensor) -> None:
    benchmark.group = "quantize"
    fmt = QuantFormat.parse(text)
    seconds = measure(benchmark, lambda: quantize_blockwise(weights, fmt))
    report_weights(benchmark, seconds, text)


@pytest.mark.parametrize("text", FORMATS)
def test_dequantize(benchmark: Any, text: str, weights: torch.Tensor) -> None:
    benchmark.group = "dequantize"
    q = quantize_blockwise(weights, QuantFormat.parse(text))
    seconds = measure(benchmark, q.dequantize)
    report_weights(benchmark, seconds, text)
