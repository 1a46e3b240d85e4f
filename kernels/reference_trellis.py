"""What the search for trellis codes means, step by step in torch: the two paths of kernels/cpu/rounding/trellis.h."""

from __future__ import annotations

import torch

from kbit.formats.trellis_code import TileFactors

NUMBERS = 256  # of a tile
_SIDE = 16
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


def search_symbols(
    wanted: torch.Tensor, values: torch.Tensor, bits: int, factors: TileFactors | None = None
) -> torch.Tensor:
    """The last k bits of every number's window in the ring that costs least, given the overlap at its seam.

    Args:
        wanted: numbers of one tile, int16 (256,), see in_units.
        values: of windows, int16 (2^L,).
        bits: k.
        factors: of this tile; None: its errors are not passed on.

    Returns:
        uint8 (256,).
    """
    choices = 1 << bits
    overlaps = len(values) // choices
    table = values.long().view(choices, overlaps)
    came_from = torch.arange(choices)[:, None] * (overlaps // choices) + torch.arange(overlaps)[None] // choices
    raw = wanted.long()
    columns = torch.zeros(_SIDE, _SIDE) if factors is None else factors.columns[0].long()

    def run(before: torch.Tensor, order: list[int], down: bool = False) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Costs after some numbers, and which window each overlap came by at each step. Of equal costs the first.

        down: errors are passed on to later rows, too.
        """
        chosen: list[torch.Tensor] = []
        base, numbers = 0, raw.clone()
        heard = torch.zeros(_SIDE, overlaps, dtype=torch.int64)  # what a row's numbers hear, by overlap
        for t in order:
            column = t % _SIDE
            if column == 0:
                heard.zero_()
                if down and factors is not None and t > 0:
                    numbers[t : t + _SIDE] += told_by_rows(before, chosen, factors.rows[0, :, t // _SIDE].long())
                    numbers.clamp_(-32767, 32767)
            own = _saturated(numbers[t] + heard[column])
            error = _saturated(own[came_from] - table)
            distance = (error.abs() << doublings(bits)).clamp(max=_MOST)
            costs = (before[came_from] + (distance * distance >> 16)).clamp(max=_MOST)
            least = (costs * choices + torch.arange(choices)[:, None]).amin(dim=0)
            which = (least % choices)[None]
            chosen.append(which[0])
            before = (least // choices - base).clamp(min=0)
            base = int(before.min())
            if factors is not None:
                told = (columns[column][:, None] * error.gather(0, which) + (1 << 14)) >> 15
                heard = _saturated(heard[:, came_from.gather(0, which)[0]] + told)
        return before, chosen

    def told_by_rows(before: torch.Tensor, chosen: list[torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
        """What the best path up to a row passes on to it, (16,): of rows above it, each with its factor of `rows`."""
        overlap, errors = int((before * overlaps + torch.arange(overlaps)).min()) % overlaps, raw.clone()
        for t in reversed(range(len(chosen))):
            window = int(chosen[t][overlap]) * overlaps + overlap
            errors[t] -= int(table.flatten()[window])
            overlap = window >> bits
        above = errors[: len(chosen)].view(-1, _SIDE)
        return ((rows[: len(above), None] * above).sum(dim=0) + (1 << 15)) >> 16

    side = seam(bits)
    order = [*range(NUMBERS - side, NUMBERS), *range(side)]
    costs, chosen = run(torch.zeros(overlaps, dtype=torch.int64), order)
    end = int((costs * overlaps + torch.arange(overlaps)).min()) % overlaps
    for step in reversed(range(side, 2 * side)):
        end = (int(chosen[step][end]) * overlaps + end) >> bits
    start = torch.full((overlaps,), _MOST, dtype=torch.int64)
    start[end] = 0
    _, chosen = run(start, list(range(NUMBERS)), down=True)
    symbols, overlap = [0] * NUMBERS, end
    for t in reversed(range(NUMBERS)):
        symbols[t] = overlap & (choices - 1)
        overlap = (int(chosen[t][overlap]) * overlaps + overlap) >> bits
    return torch.tensor(symbols, dtype=torch.uint8)


def _saturated(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.clamp(-32768, 32767)
