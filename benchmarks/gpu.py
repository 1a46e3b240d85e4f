"""Measuring on a GPU: time without the caches' or the host's help, what the GPU can do at best, and whose GPU it is.

None of this has run on a GPU here; tests/test_gpu_benchmarks.py runs it with stand-ins for what a GPU does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from statistics import median
from typing import Any

import torch

# Launches in turn work on copies of the weights that no last-level cache holds: the MI300's has 256 MB.
SPREAD = 512 << 20
MOST_COPIES = 64
REPLAYS = 10


def copies_for(nbytes: int) -> int:
    """How many copies of so many bytes to rotate."""
    return max(2, min(MOST_COPIES, -(-SPREAD // max(1, nbytes))))


class Rotation:
    """Seconds of a launch, of several that are run one after the other on different memory.

    A CUDA graph holds all of them, as decoding does: the host has no share in the time, the gaps between kernels have.
    What cannot be captured is run directly, and `graph` says so.

    Args:
        launches: the same work on different copies. They run once, to compile, before anything is timed.
    """

    def __init__(self, launches: Sequence[Callable[[], object]]) -> None:
        self._launches = list(launches)
        for launch in self._launches:
            launch()
        torch.cuda.synchronize()
        self._graph: torch.cuda.CUDAGraph | None = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self._graph):
                self._run()
        except RuntimeError:  # it waits for the device, or allocates in a way that a capture forbids
            torch.cuda.synchronize()
            self._graph = None

    @property
    def graph(self) -> bool:
        """Whether a CUDA graph is what is timed."""
        return self._graph is not None

    def seconds(self) -> float:
        """Median over replays, per launch."""
        make: Callable[..., Any] = torch.cuda.Event
        events = [(make(enable_timing=True), make(enable_timing=True)) for _ in range(REPLAYS)]
        for start, end in events:
            start.record()
            if self._graph is None:
                self._run()
            else:
                self._graph.replay()
            end.record()
        torch.cuda.synchronize()
        return median(start.elapsed_time(end) for start, end in events) / 1e3 / len(self._launches)

    def _run(self) -> None:
        for launch in self._launches:
            launch()


@lru_cache(maxsize=1)
def bandwidth() -> float:
    """Bytes per second that the GPU reads and writes when it copies 1 GiB to 1 GiB."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / Rotation([lambda: target.copy_(source)] * 4).seconds()


@lru_cache(maxsize=1)
def peak() -> float:
    """Operations per second of torch's own fp16 product (cuBLAS, rocBLAS) of two matrices of 8192 x 8192."""
    a = torch.randn((8192, 8192), dtype=torch.float16, device="cuda")
    b = torch.randn((8192, 8192), dtype=torch.float16, device="cuda")
    return 2 * 8192**3 / Rotation([lambda: a @ b] * 4).seconds()


def roofline(nbytes: float, operations: float) -> float:
    """The least seconds for so much traffic and work, by what was measured on this GPU."""
    return max(nbytes / bandwidth(), operations / peak())


def facts() -> dict[str, Any]:
    """What ran it, for a report."""
    import triton

    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": str(torch.__version__),
        "triton": str(triton.__version__),
        "copy_GB_per_s": bandwidth() / 1e9,
        "fp16_TFLOP_per_s": peak() / 1e12,
    }


def assert_product(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> float:
    """Checks a product of 16-bit factors against the reference's weight (N, K) float, and returns its relative error.

    Raises:
        AssertionError: beyond what rounding explains: three roundings of each factor, K of the sum, one of the result.
    """
    expected = x.double() @ weight.double().T
    unit = torch.finfo(x.dtype).eps
    magnitudes = x.double().abs() @ weight.double().abs().T
    bound = (2 * unit + 2 * x.shape[1] * torch.finfo(torch.float32).eps) * magnitudes + unit * expected.abs()
    error = (out.double() - expected).abs()
    # Not >: a NaN is wrong too.
    right = error <= bound + torch.finfo(out.dtype).smallest_normal
    assert bool(right.all()), f"{int((~right).sum())} of {right.numel()} results are wrong"
    return relative_error(out, expected)


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """||out - expected|| / ||expected||."""
    return float((out.double() - expected.double()).norm() / expected.double().norm())
