"""What the search for trellis codes means, step by step in torch: the two paths of kernels/cpu/rounding/trellis.h."""

from __future__ import annotations

import torch

NUMBERS = 256  # of a tile
UNIT = 8192.0  # numbers and values are counted in 1 / UNIT
_MOST = 65535  # costs are 16 bits wide and saturate


def doublings(bits: int) -> int:
    """How often a distance is doubled before it is squared: a cost is the upper half of that square."""
    return 1 if bits <= 3 else 2


def seam(bits: int) -> int:
    """Numbers to each side of the ring's seam that the first path sees."""
    return max(32, 192 // bits)


def in_units(numbers: torch.Tensor) -> torch.Tensor:
    """Numbers in units of 1 / UNIT, int16, saturated; NaN is the least."""
    scaled = numbers.float() * UNIT
    scaled = torch.where(scaled > -32767.0, scaled, -32767.0).clamp(max=32767.0)
    return scaled.round().to(torch.int16)


def search_symbols(wanted: torch.Tensor, values: torch.Tensor, bits: int) -> torch.Tensor:
    """The last k bits of every number's window in the ring that costs least, given the overlap at its seam.

    Args:
        wanted: numbers of one tile, int16 (256,), see in_units.
        values: of windows, int16 (2^L,).
        bits: k.

    Returns:
        uint8 (256,).
    """
    choices = 1 << bits
    overlaps = len(values) // choices
    table = values.long().view(choices, overlaps)
    came_from = torch.arange(choices)[:, None] * (overlaps // choices) + torch.arange(overlaps)[None] // choices

    def run(before: torch.Tensor, order: list[int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Costs after some numbers, and which window each overlap came by at each step. Of equal costs the first."""
        chosen, base = [], 0
        for t in order:
            distance = ((table - int(wanted[t])).abs() << doublings(bits)).clamp(max=_MOST)
            costs = (before[came_from] + (distance * distance >> 16)).clamp(max=_MOST)
            least = (costs * choices + torch.arange(choices)[:, None]).amin(dim=0)
            chosen.append(least % choices)
            before = (least // choices - base).clamp(min=0)
            base = int(before.min())
        return before, chosen

    side = seam(bits)
    order = [*range(NUMBERS - side, NUMBERS), *range(side)]
    costs, chosen = run(torch.zeros(overlaps, dtype=torch.int64), order)
    end = int((costs * overlaps + torch.arange(overlaps)).min()) % overlaps
    for step in reversed(range(side, 2 * side)):
        end = (int(chosen[step][end]) * overlaps + end) >> bits
    start = torch.full((overlaps,), _MOST, dtype=torch.int64)
    start[end] = 0
    _, chosen = run(start, list(range(NUMBERS)))
    symbols, overlap = [0] * NUMBERS, end
    for t in reversed(range(NUMBERS)):
        symbols[t] = overlap & (choices - 1)
        overlap = (int(chosen[t][overlap]) * overlaps + overlap) >> bits
    return torch.tensor(symbols, dtype=torch.uint8)
