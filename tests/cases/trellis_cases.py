"""Trellis codes in plain numpy: a reader of rings bit by bit, and the search as its definition says it."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from kbit.formats.outlier_weights import PLACES, VALUES
from kbit.formats.quant_tensor import QuantTensor
from kbit.formats.registry import parse_format
from kbit.kernels.reference_trellis import UNIT, doublings, seam


def trellis_tensor(format: str, rows: int, columns: int) -> QuantTensor:
    """Random rings with random scales and signs: every window can occur. A matrix in a trellis format."""
    generator = torch.Generator().manual_seed(rows * columns)
    codec = parse_format(format)
    stored = {}
    for name, part in codec.parts(rows, columns).items():
        stored[name] = torch.randint(0, 256, part.shape, dtype=torch.uint8, generator=generator)
    if VALUES in stored:  # the last one is not used
        count = len(stored[VALUES])
        places = 1 + torch.randperm(rows * columns - 1, generator=generator)[: count - 1].sort().values
        stored[PLACES] = torch.nn.functional.pad(places, (1, 0)).int()
        stored[VALUES] = torch.nn.functional.pad(20 * torch.randn(count - 1, generator=generator), (1, 0)).half()
    stored["scales"] = (torch.rand(rows, 1, generator=generator) + 0.1).half()
    return QuantTensor(codec, (rows, columns), stored, torch.zeros(0))


def ring_windows(ring: NDArray[np.uint8], bits: int, window: int, half: bool = False) -> list[int]:
    """The 256 windows of a ring, uint8 (32 bits,), read bit by bit; with half, every second has a bit more."""
    string = [int(byte) >> (7 - i) & 1 for byte in ring for i in range(8)]
    found = []
    for t in range(256):
        end = (t + 1) * bits + half * ((t + 1) // 2)
        value = 0
        for place in range(end - window, end):
            value = 2 * value + string[place % len(string)]
        found.append(value)
    return found


def level(code: str, window: int, bits: int) -> int:
    """What a window stands for."""
    if code == "int":
        return window - (1 << bits - 1)
    if code == "sum4":
        return sum((window * 0x83DCD12D % 2**32).to_bytes(4, "little")) - 510
    return sum((window * 47157 % 2**16).to_bytes(2, "little")) - 255


def cost_of(numbers: NDArray[np.float32], values: NDArray[np.int64], windows: list[int], bits: int) -> int:
    """What windows cost as the search counts, without saturation."""
    wanted = np.rint(np.clip(numbers * np.float32(UNIT), -32767, 32767)).astype(np.int64)
    distance = np.minimum(np.abs(values[windows] - wanted) << doublings(bits), 65535)
    return int((distance**2 >> 16).sum())


def best_ring(
    numbers: NDArray[np.float32], values: NDArray[np.int64], bits: int, half: bool = False
) -> tuple[int, int]:
    """The overlap at the seam and the least cost, by the search's two passes.

    Args:
        numbers: float32 (256,).
        values: of windows in units of 1 / UNIT, int64 (2^L,).
        bits: k.
        half: odd numbers have a bit more.
    """
    wanted = np.rint(np.clip(numbers * np.float32(UNIT), -32767, 32767)).astype(np.int64)
    states = len(values) >> bits  # overlaps at the seam

    def run(before: NDArray[np.int64], order: list[int]) -> tuple[NDArray[np.int64], list[NDArray[np.int64]]]:
        chosen = []
        for t in order:
            brought, following = bits + (half and t % 2), bits + (half and 1 - t % 2)
            by_choice = values.reshape(1 << following, -1)  # windows that end in the same overlap with the next
            distance = np.minimum(np.abs(by_choice - wanted[t]) << doublings(bits), 65535)
            came_from = np.arange(len(values)).reshape(by_choice.shape) >> brought
            costs = before[came_from] + (distance**2 >> 16)
            chosen.append(costs.argmin(axis=0))
            before = costs.min(axis=0)
        return before, chosen

    side = seam(bits)
    order = [*range(256 - side, 256), *range(side)]
    costs, chosen = run(np.zeros(states, dtype=np.int64), order)
    overlap = int(costs.argmin())
    for step in range(2 * side - 1, side - 1, -1):
        overlap = (int(chosen[step][overlap]) * len(chosen[step]) + overlap) >> bits + (half and order[step] % 2)
    start = np.full(states, 1 << 40, dtype=np.int64)
    start[overlap] = 0
    costs, _ = run(start, list(range(256)))
    return overlap, int(costs[overlap])
