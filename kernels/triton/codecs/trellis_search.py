"""The search for trellis codes on a GPU: for each tile the ring that kernels/cpu/rounding/trellis.h finds, bit for bit.

A program has one tile. It keeps two rows of costs, one for each overlap of two windows, and the choices of 256 steps in
memory of its own (the L1 and L2 caches hold the costs); a step reads the row before, and adds for every window what its
number would cost. Costs are whole numbers of 16 bits that saturate, and of equal ones the first wins, as on the CPU and
in kernels/reference_trellis.py, so that results are the same. Where errors are passed on within the tile, it also keeps
what every overlap hears of its own path's, for each column of the row. At half widths odd numbers bring a bit more: two
kinds of steps in turn, and after even numbers half as many overlaps. The way back is a chain of 256 loads; other
programs go forward meanwhile.

Threads read what others of their program wrote to memory. On NVIDIA's GPUs a barrier orders that. On AMD's, Triton
3.7.1 compiles the barrier without waiting for stores (seen in the machine code for gfx942), so these are refused.

Work: 2^L windows a step, about 400 steps a tile; bound by integer instructions. Checked in the interpreter and by its
machine code, not timed on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kbit.formats.trellis import INTEGER_BITS, TrellisFormat
from kbit.formats.trellis_code import TileFactors, levels
from kbit.host.errors import UnsupportedError
from kbit.kernels.reference_trellis import NUMBERS, doublings, in_units, seam, to_strings
from kbit.kernels.triton.target import active, current_arch

_SCRATCH_BYTES = 1 << 30  # of all programs of a launch
_BLOCK = 1024  # overlaps that a program looks at together


@triton.jit
def search_step(
    values_ptr, before_ptr, after_ptr, choices_ptr, number, base,
    BITS: tl.constexpr, NEXT: tl.constexpr, AFTER: tl.constexpr, DOUBLINGS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One number, which brings BITS bits, before one that brings NEXT: the least cost of each of the AFTER overlaps
    after it, less `base`, and which window it came by.

    Window j m (j its first NEXT bits) comes from overlap (j m) >> BITS: FROM overlaps at a time, each of which goes to
    2^BITS neighbours.

    Returns:
        The least of these costs.
    """
    PART: tl.constexpr = AFTER >> BITS
    FROM: tl.constexpr = (BLOCK if BLOCK < AFTER else AFTER) >> BITS
    SIDE: tl.constexpr = 1 << BITS
    least_of_all = 65535
    for first in range(0, PART, FROM):
        came = first + tl.arange(0, FROM)
        m = came[:, None] * SIDE + tl.arange(0, SIDE)[None, :]
        least = tl.full((FROM, SIDE), 65536, tl.int32)
        which = tl.zeros((FROM, SIDE), tl.int32)
        for j in range(1 << NEXT):
            value = tl.load(values_ptr + j * AFTER + m).to(tl.int32)
            distance = tl.minimum(tl.abs(value - number) << DOUBLINGS, 65535).to(tl.uint32)
            square = ((distance * distance) >> 16).to(tl.int32)
            before = tl.load(before_ptr + j * PART + came).to(tl.int32) & 0xFFFF
            cost = tl.minimum(before[:, None] + square, 65535)
            which = tl.where(cost < least, j, which)
            least = tl.minimum(least, cost)
        least = tl.maximum(least - base, 0)
        tl.store(after_ptr + m, least.to(tl.int16))
        tl.store(choices_ptr + m, which.to(tl.int8))
        least_of_all = tl.minimum(least_of_all, tl.min(tl.min(least, 1), 0))
    return least_of_all


@triton.jit
def search_step_heard(
    values_ptr, before_ptr, after_ptr, choices_ptr, number, base, heard_ptr, told_ptr, columns_ptr, column, alone,
    BITS: tl.constexpr, NEXT: tl.constexpr, AFTER: tl.constexpr, OVERLAPS: tl.constexpr, DOUBLINGS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """`search_step` where errors are passed on along the row.

    Args:
        heard_ptr: what the row's numbers hear, by overlap before this one, int16 (16, OVERLAPS), the most there are.
        told_ptr: the same by overlap after it.
        columns_ptr: what this number's error counts for each, int16 (16,).
        column: of this number.
        alone: it hears nothing.
    """
    PART: tl.constexpr = AFTER >> BITS
    FROM: tl.constexpr = (BLOCK if BLOCK < AFTER else AFTER) >> BITS
    SIDE: tl.constexpr = 1 << BITS
    least_of_all = 65535
    for first in range(0, PART, FROM):
        came = first + tl.arange(0, FROM)
        m = came[:, None] * SIDE + tl.arange(0, SIDE)[None, :]
        least = tl.full((FROM, SIDE), 65536, tl.int32)
        which = tl.zeros((FROM, SIDE), tl.int32)
        error = tl.zeros((FROM, SIDE), tl.int32)
        for j in range(1 << NEXT):
            value = tl.load(values_ptr + j * AFTER + m).to(tl.int32)
            heard = tl.load(heard_ptr + column * OVERLAPS + j * PART + came).to(tl.int32)
            own = tl.minimum(tl.maximum(number + tl.where(alone, 0, heard), -32768), 32767)
            off = tl.minimum(tl.maximum(own[:, None] - value, -32768), 32767)
            distance = tl.minimum(tl.abs(off) << DOUBLINGS, 65535).to(tl.uint32)
            square = ((distance * distance) >> 16).to(tl.int32)
            before = tl.load(before_ptr + j * PART + came).to(tl.int32) & 0xFFFF
            cost = tl.minimum(before[:, None] + square, 65535)
            which = tl.where(cost < least, j, which)
            error = tl.where(cost < least, off, error)
            least = tl.minimum(least, cost)
        least = tl.maximum(least - base, 0)
        tl.store(after_ptr + m, least.to(tl.int16))
        tl.store(choices_ptr + m, which.to(tl.int8))
        least_of_all = tl.minimum(least_of_all, tl.min(tl.min(least, 1), 0))
        for later in range(column + 1, 16):
            factor = tl.load(columns_ptr + later).to(tl.int32)
            heard = tl.load(heard_ptr + later * OVERLAPS + which * PART + came[:, None]).to(tl.int32)
            told = tl.where(alone, 0, heard) + ((factor * error + (1 << 14)) >> 15)
            tl.store(told_ptr + later * OVERLAPS + m, tl.minimum(tl.maximum(told, -32768), 32767).to(tl.int16))
    return least_of_all


@triton.jit
def hear_rows(
    wanted_ptr, numbers_ptr, path_ptr, values_ptr, costs_ptr, choices_ptr, rows_ptr, count,
    BITS: tl.constexpr, HALF: tl.constexpr, OVERLAPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Numbers [count, count + 16) plus what the best path up to there passes on to their row.

    path_ptr: the windows of the path that was best a row earlier.
    """
    side = tl.arange(0, 16)
    overlap = best_overlap(costs_ptr, OVERLAPS, BLOCK)
    i = count - 1
    while i >= 0:
        window = window_of(choices_ptr, i, overlap, HALF, OVERLAPS)
        known = tl.load(path_ptr + i)
        tl.debug_barrier()  # all have read it
        tl.store(path_ptr + i, window)
        overlap = window >> bits_of(i, BITS, HALF)
        # Where the windows are the same, so are all earlier ones.
        i = tl.where((i < count - 16) & (known == window), -1, i - 1)
    tl.debug_barrier()
    sums = tl.zeros((16,), tl.int64)
    for row in range(count // 16):
        value = tl.load(values_ptr + tl.load(path_ptr + row * 16 + side)).to(tl.int64)
        factor = tl.load(rows_ptr + row * 16 + count // 16).to(tl.int64)
        sums += factor * (tl.load(wanted_ptr + row * 16 + side).to(tl.int64) - value)
    number = tl.load(wanted_ptr + count + side).to(tl.int64) + ((sums + (1 << 15)) >> 16)
    tl.store(numbers_ptr + count + side, tl.minimum(tl.maximum(number, -32767), 32767).to(tl.int16))


@triton.jit
def best_overlap(costs_ptr, OVERLAPS: tl.constexpr, BLOCK: tl.constexpr):
    """Where costs are least; of equal ones the first."""
    at = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), 0x7FFFFFFF, tl.int32)  # cost and overlap in one number
    for first in range(0, OVERLAPS, BLOCK):
        cost = tl.load(costs_ptr + first + at).to(tl.int32) & 0xFFFF
        best = tl.minimum(best, cost * OVERLAPS + first + at)
    return tl.min(best, 0) % OVERLAPS


@triton.jit
def search_number(
    wanted_ptr, numbers_ptr, path_ptr, values_ptr, costs_ptr, choices_ptr, heard_ptr, columns_ptr, rows_ptr,
    begin, i, base,
    ODD: tl.constexpr, BITS: tl.constexpr, HALF: tl.constexpr, OVERLAPS: tl.constexpr, DOUBLINGS: tl.constexpr,
    BLOCK: tl.constexpr, HEARD: tl.constexpr, DOWN: tl.constexpr,
):  # fmt: skip
    """The costs after number begin + i from those before it; returns their least. ODD: it brings BITS + HALF bits."""
    IN: tl.constexpr = BITS + (HALF if ODD else 0)
    NEXT: tl.constexpr = BITS + (0 if ODD else HALF)
    AFTER: tl.constexpr = OVERLAPS >> (NEXT - BITS)
    before, after = costs_ptr + i % 2 * OVERLAPS, costs_ptr + (i + 1) % 2 * OVERLAPS
    at = (begin + i) % 256
    if HEARD:
        column = at % 16
        if DOWN and not ODD and column == 0 and i > 0:
            hear_rows(
                wanted_ptr, numbers_ptr, path_ptr, values_ptr, before, choices_ptr, rows_ptr, i,
                BITS, HALF, OVERLAPS, BLOCK,
            )  # fmt: skip
            tl.debug_barrier()
        number = tl.load((numbers_ptr if DOWN else wanted_ptr) + at).to(tl.int32)
        least = search_step_heard(
            values_ptr, before, after, choices_ptr + i * OVERLAPS, number, base,
            heard_ptr + i % 2 * 16 * OVERLAPS, heard_ptr + (i + 1) % 2 * 16 * OVERLAPS,
            columns_ptr + column * 16, column, (i == 0) | (column == 0), IN, NEXT, AFTER, OVERLAPS, DOUBLINGS, BLOCK,
        )  # fmt: skip
    else:
        number = tl.load(wanted_ptr + at).to(tl.int32)
        least = search_step(
            values_ptr, before, after, choices_ptr + i * OVERLAPS, number, base, IN, NEXT, AFTER, DOUBLINGS, BLOCK
        )
    tl.debug_barrier()  # the next step reads what all threads have written
    return least


@triton.jit
def search_path(
    wanted_ptr, numbers_ptr, path_ptr, values_ptr, costs_ptr, choices_ptr, heard_ptr, columns_ptr, rows_ptr,
    begin, count,
    BITS: tl.constexpr, HALF: tl.constexpr, OVERLAPS: tl.constexpr, DOUBLINGS: tl.constexpr, BLOCK: tl.constexpr,
    HEARD: tl.constexpr, DOWN: tl.constexpr,
):  # fmt: skip
    """The costs after numbers [begin, begin + count), which go round the ring, in row 0; begin and count are even.

    HEARD: errors are passed on along rows. DOWN: and to later rows.
    """
    base = 0
    for i in range(0, count, 1 + HALF):
        base = search_number(
            wanted_ptr, numbers_ptr, path_ptr, values_ptr, costs_ptr, choices_ptr, heard_ptr, columns_ptr, rows_ptr,
            begin, i, base, False, BITS, HALF, OVERLAPS, DOUBLINGS, BLOCK, HEARD, DOWN,
        )  # fmt: skip
        if HALF:
            base = search_number(
                wanted_ptr, numbers_ptr, path_ptr, values_ptr, costs_ptr, choices_ptr, heard_ptr, columns_ptr, rows_ptr,
                begin, i + 1, base, True, BITS, HALF, OVERLAPS, DOUBLINGS, BLOCK, HEARD, DOWN,
            )  # fmt: skip


@triton.jit
def bits_of(i, BITS: tl.constexpr, HALF: tl.constexpr):
    """Bits that number i brings."""
    return BITS + HALF * (i % 2)


@triton.jit
def window_of(choices_ptr, i, overlap, HALF: tl.constexpr, OVERLAPS: tl.constexpr):
    """The window of number i that led to the overlap after it."""
    choice = tl.load(choices_ptr + i * OVERLAPS + overlap).to(tl.int32) & 0xFF
    return choice * (OVERLAPS >> (HALF * (1 - i % 2))) + overlap


@triton.jit
def trellis_search_kernel(
    wanted_ptr, numbers_ptr, path_ptr, values_ptr, costs_ptr, choices_ptr, heard_ptr, columns_ptr, rows_ptr,
    symbols_ptr,
    BITS: tl.constexpr, HALF: tl.constexpr, OVERLAPS: tl.constexpr, DOUBLINGS: tl.constexpr, SEAM: tl.constexpr,
    BLOCK: tl.constexpr, HEARD: tl.constexpr,
):  # fmt: skip
    """Grid (tiles,): the last bits of each number's window, those it brings, uint8 (tiles, 256).

    BITS of them or, where HALF is 1, of odd numbers one more. Of OVERLAPS, there are half as many after even numbers
    then, as the next brings more; those of both sides of the seam are after odd ones.

    Args:
        wanted_ptr: int16 (tiles, 256), in units of 1 / UNIT.
        numbers_ptr: scratch, a copy of them; as path_ptr, heard_ptr, columns_ptr and rows_ptr only read where HEARD.
        path_ptr: scratch, int32 (tiles, 256).
        values_ptr: int16 (2^L,), likewise.
        costs_ptr: scratch, int16 (tiles, 2 OVERLAPS).
        choices_ptr: scratch, int8 (tiles, 256 OVERLAPS).
        heard_ptr: scratch, int16 (tiles, 2, 16, OVERLAPS).
        columns_ptr, rows_ptr: how errors are passed on, int16 and int32 (tiles, 16, 16) (`TileFactors`).
    """
    tile = tl.program_id(0).to(tl.int64)
    wanted, numbers, path = wanted_ptr + tile * 256, numbers_ptr + tile * 256, path_ptr + tile * 256
    heard = heard_ptr + tile * 32 * OVERLAPS
    columns, rows = columns_ptr + tile * 256, rows_ptr + tile * 256
    costs = costs_ptr + tile * 2 * OVERLAPS
    choices = choices_ptr + tile * 256 * OVERLAPS
    at = tl.arange(0, BLOCK)
    for first in range(0, OVERLAPS, BLOCK):
        tl.store(costs + first + at, tl.zeros((BLOCK,), tl.int16))
    tl.debug_barrier()
    search_path(
        wanted, numbers, path, values_ptr, costs, choices, heard, columns, rows, 256 - SEAM, 2 * SEAM,
        BITS, HALF, OVERLAPS, DOUBLINGS, BLOCK, HEARD, False,
    )  # fmt: skip
    overlap = best_overlap(costs, OVERLAPS, BLOCK)
    for step in range(SEAM):
        i = 2 * SEAM - 1 - step
        overlap = window_of(choices, i, overlap, HALF, OVERLAPS) >> bits_of(i, BITS, HALF)
    end = overlap
    tl.debug_barrier()
    for first in range(0, OVERLAPS, BLOCK):
        tl.store(costs + first + at, tl.where(first + at == end, 0, -1).to(tl.int16))
    tl.debug_barrier()
    search_path(
        wanted, numbers, path, values_ptr, costs, choices, heard, columns, rows, 0, 256,
        BITS, HALF, OVERLAPS, DOUBLINGS, BLOCK, HEARD, True,
    )  # fmt: skip
    overlap = end
    for step in range(256):
        i = 256 - 1 - step
        window, bits = window_of(choices, i, overlap, HALF, OVERLAPS), bits_of(i, BITS, HALF)
        tl.store(symbols_ptr + tile * 256 + i, (window & ((1 << bits) - 1)).to(tl.uint8))
        overlap = window >> bits


def search_on_gpu(
    format: TrellisFormat, tiles: torch.Tensor, device: torch.device | str, factors: TileFactors | None = None
) -> torch.Tensor:
    """`trellis_code.search` on a GPU: the same rings.

    Args:
        format: of them, below 7 bits (wider codes are integers, for which nothing is searched).
        tiles: in units of the row's scale, float32 (T, 256).
        device: where to search.
        factors: how errors are passed on within the tiles; None: they are not.

    Returns:
        uint8 (T, bytes of a ring) on the CPU.

    Raises:
        UnsupportedError: a GPU of AMD's.
    """
    assert format.bits < INTEGER_BITS
    values = in_units(levels(format, torch.arange(1 << format.window)).float() * format.step)
    with active(device):
        if factors is not None:
            factors = TileFactors(factors.columns.to(device), factors.rows.to(device))
        symbols = search_symbols(format, in_units(tiles).to(device), values.to(device), factors)
    return to_strings(symbols.cpu(), format.bits, format.half)


def search_symbols(
    format: TrellisFormat, wanted: torch.Tensor, values: torch.Tensor, factors: TileFactors | None = None
) -> torch.Tensor:
    """The last bits of every number's window, those it brings: k, or of odd numbers at half widths k + 1.

    Args:
        format: of the codes.
        wanted: numbers in units of 1 / UNIT, int16 (T, 256).
        values: what windows stand for, likewise, int16 (2^L,).
        factors: how errors are passed on within the tiles; None: they are not.

    Returns:
        uint8 (T, 256).

    Raises:
        UnsupportedError: a GPU of AMD's.
    """
    if (arch := current_arch()).startswith("gfx"):
        raise UnsupportedError(
            f"trellis codes are searched for on NVIDIA's GPUs and on the CPU, not on {arch}; use --device cpu"
        )
    tiles, overlaps, device = len(wanted), 1 << (format.window - format.bits), wanted.device
    symbols = torch.empty(wanted.shape, dtype=torch.uint8, device=device)
    heard_columns = 0 if factors is None else 2 * 16
    # By the machine code: 3.5 bits spill on sm_80 with 1024, 2.5 on sm_120 with 512. (Where errors are passed on
    # nothing does, and 512 take more instructions.)
    block = min(_BLOCK // 2 if format.width > 3 and format.half and factors is None else _BLOCK, overlaps)
    group = max(1, _SCRATCH_BYTES // ((NUMBERS + 4 + 2 * heard_columns) * overlaps))
    costs = torch.empty((min(group, tiles), 2 * overlaps), dtype=torch.int16, device=device)
    choices = torch.empty((min(group, tiles), NUMBERS * overlaps), dtype=torch.int8, device=device)
    heard = torch.empty((min(group, tiles), heard_columns * overlaps), dtype=torch.int16, device=device)
    numbers = wanted if factors is None else wanted.clone()
    path = torch.empty(wanted.shape, dtype=torch.int32, device=device)
    for start in range(0, tiles, group):
        part = slice(start, start + group)
        columns, rows = (wanted, symbols) if factors is None else (factors.columns[part], factors.rows[part])
        trellis_search_kernel[(len(wanted[part]),)](
            wanted[part], numbers[part], path[part], values, costs, choices, heard,
            columns.contiguous(), rows.contiguous(), symbols[part],
            BITS=format.bits, HALF=int(format.half), OVERLAPS=overlaps, DOUBLINGS=doublings(format.bits),
            SEAM=seam(format.bits), BLOCK=block, HEARD=factors is not None, num_warps=4,
        )  # fmt: skip
    return symbols
