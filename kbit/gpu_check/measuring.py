"""Measuring on a GPU: time without the caches' or the host's help, and what the GPU can do at best."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from statistics import median
from time import perf_counter
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
        return float(median(start.elapsed_time(end) for start, end in events)) / 1e3 / len(self._launches)

    def _run(self) -> None:
        for launch in self._launches:
            launch()


@lru_cache(maxsize=1)
def bandwidth() -> float:
    """Bytes per second that the GPU reads and writes when it copies 1 GiB to 1 GiB."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / Rotation([lambda: target.copy_(source)] * 4).seconds()


@lru_cache(maxsize=2)
def peak(dtype: torch.dtype = torch.float16) -> float:
    """Operations per second of torch's own product (cuBLAS, rocBLAS) of two matrices of 8192 x 8192 in half
    precision."""
    a, b = (torch.randn((8192, 8192), dtype=dtype, device="cuda") for _ in range(2))
    return 2 * 8192**3 / Rotation([lambda: a @ b] * 4).seconds()


def roofline(nbytes: float, operations: float) -> float:
    """The least seconds for so much traffic and work, by what was measured on this GPU."""
    return max(nbytes / bandwidth(), operations / peak())


@contextmanager
def timed() -> Iterator[list[float]]:
    """Seconds of what the block does on the GPU, in the list it gives."""
    torch.cuda.synchronize()
    result: list[float] = []
    begin = perf_counter()
    yield result
    torch.cuda.synchronize()
    result.append(perf_counter() - begin)


def rotated(weight: Any) -> list[Any]:
    """A prepared weight and copies of what a launch reads."""
    names = ("planes", "scales", "scales_super", "offsets", "offsets_super", "table", "rotation")

    def clone(value: Any) -> Any:
        return tuple(part.clone() for part in value) if isinstance(value, tuple) else value.clone()

    parts = {name: getattr(weight, name) for name in names if getattr(weight, name) is not None}
    copies = range(copies_for(weight.nbytes) - 1)
    return [weight, *(replace(weight, **{name: clone(value) for name, value in parts.items()}) for _ in copies)]


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
