"""Which numbers the windows of a trellis code stand for, and rings of bits from and to windows.

Numbers are integer levels times a step. Those of neighbouring windows should have nothing to do with each other, and be
spread like normal numbers, at few instructions each; a product with overflow shuffles, and a sum of its bytes is nearly
normal:

    sum4    x = 0x83dcd12d w mod 2^32, the sum of its four bytes less 510      (exllamav3's "mul1", MIT licence)
    sum2    x = 47157 w mod 2^16, the sum of its two bytes less 255            (half the instructions; thin tails)
    int     w less 2^(k - 1)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from threading import local
from typing import TYPE_CHECKING, TypeAlias

import torch

if TYPE_CHECKING:
    from kbit import _native
    from kbit.formats.trellis import TrellisFormat

TILE = 16
SUM4_FACTOR, SUM2_FACTOR = 0x83DCD12D, 47157
_NORMAL_TILES = 96  # that `normal_error` looks at


def levels(format: TrellisFormat, windows: torch.Tensor) -> torch.Tensor:
    """The integers that windows (int32 or int64, below 2^L) stand for, int32, the shape of `windows`."""
    return _levels(format.keeping(0)).to(windows.device)[windows]


@lru_cache(maxsize=16)
def _levels(format: TrellisFormat) -> torch.Tensor:
    windows = torch.arange(1 << format.window, dtype=torch.int64)
    if format.code == "int":
        return (windows - (1 << format.bits - 1)).int()
    if format.code == "sum4":
        x = (windows * SUM4_FACTOR) & 0xFFFFFFFF
        return ((x & 255) + (x >> 8 & 255) + (x >> 16 & 255) + (x >> 24) - 510).int()
    x = (windows * SUM2_FACTOR) & 0xFFFF
    return ((x & 255) + (x >> 8) - 255).int()


def row_windows(format: TrellisFormat, codes: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The windows of some rows' weights.

    Args:
        format: of the matrix.
        codes: uint8 (row tiles, column tiles, bytes of a ring).
        rows: int64 (R,).

    Returns:
        int64 (R, 16 column tiles).
    """
    by_row = codes.view(codes.shape[0], codes.shape[1], TILE, format.tile_bytes // TILE)
    tile, row = rows // TILE, rows % TILE
    # A row's first windows begin in the row before it; of the first row that is the last.
    before = by_row[tile, :, (row - 1) % TILE, -2:]
    stream = torch.cat([before, by_row[tile, :, row]], dim=-1).to(torch.int32)  # (R, tiles, 2 + bytes of a row)
    count = torch.arange(1, TILE + 1, device=codes.device)
    last = 15 + format.bits * count + format.half * (count // 2)  # bit of each window, from the highest on
    byte = last // 8
    joined = (stream[..., byte - 2] << 16) | (stream[..., byte - 1] << 8) | stream[..., byte]
    found = (joined >> (7 - last % 8)) & ((1 << format.window) - 1)
    return found.flatten(1).long()


def to_tiles(values: torch.Tensor) -> torch.Tensor:
    """A matrix's tiles: float32 (N, K) -> (N / 16 * K / 16, 256), filled up with zeros."""
    rows, columns = values.shape
    full = torch.nn.functional.pad(values, (0, -columns % TILE, 0, -rows % TILE))
    cut = full.view(full.shape[0] // TILE, TILE, full.shape[1] // TILE, TILE)
    return cut.transpose(1, 2).reshape(-1, TILE * TILE)


def tile_levels(format: TrellisFormat, strings: torch.Tensor) -> torch.Tensor:
    """What the rings of tiles stand for: uint8 (T, bytes) -> levels, int32 (T, 16, 16)."""
    rows = torch.arange(TILE * len(strings), device=strings.device)
    return levels(format, row_windows(format, strings[:, None], rows)).view(-1, TILE, TILE)


@dataclass(frozen=True, eq=False)
class TileFactors:
    """How errors are passed on within each of T tiles, as searches take it: of errors E, the squares of R' E C count.

    Attributes:
        columns: C, upper triangular with ones on the diagonal, of which only what is above it is read: int16
            (T, 16, 16) in units of 2^-15, none of -32768.
        rows: R likewise, int32 (T, 16, 16) in units of 2^-16.
    """

    columns: torch.Tensor
    rows: torch.Tensor

    @classmethod
    def of(cls, columns: torch.Tensor, rows: torch.Tensor) -> TileFactors:
        """From float32 (T, 16, 16); what does not fit is saturated."""
        return cls(
            (columns * 2.0**15).round().clamp(-32767, 32767).to(torch.int16),
            (rows * 2.0**16).round().clamp(-(2.0**30), 2.0**30).to(torch.int32),
        )

    def __getitem__(self, some: slice) -> TileFactors:
        return TileFactors(self.columns[some], self.rows[some])


def search(
    format: TrellisFormat, tiles: torch.Tensor, threads: int, factors: TileFactors | None = None
) -> torch.Tensor:
    """The rings that stand for numbers nearest to those of tiles.

    Args:
        format: of them.
        tiles: in units of the row's scale, float32 (T, 256).
        threads: to work with; the result does not depend on it.
        factors: how errors are passed on within the tiles; None: they are not. Integers pass on none.

    Returns:
        uint8 (T, bytes of a ring).
    """
    found = torch.empty(len(tiles), format.tile_bytes, dtype=torch.uint8)
    if format.code == "int":
        top = 1 << format.bits - 1
        codes = (tiles / format.step).round().clamp(-top, top - 1).to(torch.int32) + top
        places = torch.arange(format.bits - 1, -1, -1, dtype=torch.int32)
        string = ((codes[:, :, None] >> places) & 1).view(len(tiles), -1, 8)
        weights = 2 ** torch.arange(7, -1, -1, dtype=torch.int32)
        return (string * weights).sum(dim=-1).to(torch.uint8)
    if _elsewhere is not None:
        return _elsewhere(format, tiles, factors)
    from kbit import _native

    passed_on = (None, None) if factors is None else (factors.columns.contiguous(), factors.rows.contiguous())
    _native.trellis_search(
        tiles.contiguous(), _values(format), format.bits, found, _context(threads), format.half, *passed_on
    )
    return found


# Who searches in place of the CPU, in all threads.
_Search: TypeAlias = "Callable[[TrellisFormat, torch.Tensor, TileFactors | None], torch.Tensor]"
_elsewhere: _Search | None = None


@contextmanager
def searching_with(other: _Search) -> Iterator[None]:
    """Within this block `search` asks another one, (format, tiles, factors) -> the same rings; in the whole process."""
    global _elsewhere
    before, _elsewhere = _elsewhere, other
    try:
        yield
    finally:
        _elsewhere = before


@lru_cache(maxsize=64)
def normal_error(format: TrellisFormat) -> float:
    """Mean squared error of normal numbers in a format, in shares of their own; to 1 %, and the same at each call."""
    numbers = torch.randn(_NORMAL_TILES, TILE * TILE, generator=torch.Generator().manual_seed(0))
    found = tile_levels(format, search(format, numbers * format.share, 1)).flatten(1) * (format.step / format.share)
    return float((found - numbers).square().sum() / numbers.square().sum())


@lru_cache(maxsize=16)
def _values(format: TrellisFormat) -> torch.Tensor:
    return _levels(format).float() * format.step


class _Contexts(local):
    """The native contexts of one thread, by how many threads each has: who shares a context takes turns."""

    def __init__(self) -> None:
        self.by_threads: dict[int, _native.Context] = {}


_contexts = _Contexts()


def _context(threads: int) -> _native.Context:
    from kbit import _native

    found = _contexts.by_threads.get(threads)
    if found is None:
        found = _contexts.by_threads[threads] = _native.Context(threads=threads)
    return found
