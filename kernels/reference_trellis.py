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
    wanted: torch.Tensor, values: torch.Tensor, bits: int, factors: TileFactors | None = None, *, half: bool = False
) -> torch.Tensor:
    """The last bits of every number's window in the ring that costs least, given the overlap at its seam.

    Those that the number brings: k or, of odd numbers with half a bit more, k + 1.

    Args:
        wanted: numbers of one tile, int16 (256,), see in_units.
        values: of windows, int16 (2^L,).
        bits: k.
        factors: of this tile; None: its errors are not passed on.
        half: half a bit more.

    Returns:
        uint8 (256,).
    """
    overlaps = len(values) >> bits  # at the seam, and before all even numbers
    brought = (bits, bits + half)  # by even and odd numbers
    # Of even and odd numbers windows as (the bits that the next brings, overlap after the number), and where they come
    # from: the overlap before it.
    windows = [torch.arange(len(values)).view(1 << brought[1 - odd], -1) for odd in (0, 1)]
    tables = [values.long()[window] for window in windows]
    sources = [windows[odd] >> brought[odd] for odd in (0, 1)]
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
            column, table, came_from = t % _SIDE, tables[t % 2], sources[t % 2]
            choices = len(table)
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
            window = window_of(chosen[t], overlap)
            errors[t] -= int(values[window])
            overlap = window >> brought[t % 2]
        above = errors[: len(chosen)].view(-1, _SIDE)
        return ((rows[: len(above), None] * above).sum(dim=0) + (1 << 15)) >> 16

    def window_of(chosen: torch.Tensor, overlap: int) -> int:
        return int(chosen[overlap]) * len(chosen) + overlap

    side = seam(bits)  # even
    order = [*range(NUMBERS - side, NUMBERS), *range(side)]
    costs, chosen = run(torch.zeros(overlaps, dtype=torch.int64), order)
    end = int((costs * overlaps + torch.arange(overlaps)).min()) % overlaps
    for step in reversed(range(side, 2 * side)):
        end = window_of(chosen[step], end) >> brought[step % 2]
    start = torch.full((overlaps,), _MOST, dtype=torch.int64)
    start[end] = 0
    _, chosen = run(start, list(range(NUMBERS)), down=True)
    symbols, overlap = [0] * NUMBERS, end
    for t in reversed(range(NUMBERS)):
        window = window_of(chosen[t], overlap)
        symbols[t] = window & ((1 << brought[t % 2]) - 1)
        overlap = window >> brought[t % 2]
    return torch.tensor(symbols, dtype=torch.uint8)


def to_strings(symbols: torch.Tensor, bits: int, half: bool = False) -> torch.Tensor:
    """The bits of numbers one after another.

    Args:
        symbols: uint8 (T, 256), below 2^k; of odd numbers with half a bit more below 2^(k + 1).
        bits: k.
        half: half a bit more.

    Returns:
        uint8 (T, bytes of a ring), the first bit in a byte's highest.
    """
    parts = []
    for odd in (0, 1):
        places = torch.arange(bits + (half and odd) - 1, -1, -1, dtype=torch.uint8)
        parts.append((symbols[:, odd::2, None] >> places) & 1)
    string = torch.cat(parts, dim=-1).view(len(symbols), -1, 8)
    weights = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8)
    return (string * weights).sum(dim=-1, dtype=torch.uint8)


def _saturated(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.clamp(-32768, 32767)
