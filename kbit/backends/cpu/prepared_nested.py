"""Nested matrices in a file of prepared weights: every rung reads a few stretches of it, and shares its memory.

What lies behind the arrays of all other tensors:

    planes   those of every matrix's narrowest width, one matrix after another, then one bit for each step of the
             model's order (kbit.checkpoint.ladder; where it has none, of all matrices for one width, then the next)
    scales   in the same order, each matrix's of a width with that width's codebook

so a rung needs the planes up to its last step, which lie in one stretch, and each matrix's scales of its width: as many
bytes as a plain file of these widths has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import RawIOBase
from typing import TYPE_CHECKING, Any

import numpy as np

from kbit import _native
from kbit.backends.cpu.pieces import PIECE_BYTES, gap, write_all
from kbit.backends.cpu.weight import nested_matrix
from kbit.formats.nested import NestedFormat
from kbit.formats.registry import parse_format
from kbit.formats.stored_nested import StoredNested

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kbit._native import Context
    from kbit.checkpoint.ladder import Ladder
    from kbit.checkpoint.source import CheckpointSource

_PANEL_ROWS, _TILE_COLUMNS = 16, 64  # kernels/cpu/codecs/matrix.h
_NUMBER_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class NestedMatrix:
    """A nested matrix that a file is to hold: its format and shape."""

    format: NestedFormat
    shape: tuple[int, int]

    @property
    def _tiles(self) -> int:
        return -(-self.shape[0] // _PANEL_ROWS) * -(-self.shape[1] // _TILE_COLUMNS)

    def planes(self, width: int) -> list[int]:
        """Bytes of the planes that a width adds to those below it."""
        one = self._tiles * _PANEL_ROWS * _TILE_COLUMNS // 8
        return [2 * one, *(one for _ in range(3, width + 1))] if width == self.format.low else [one]

    def scales(self, width: int) -> list[int]:
        """Bytes of a width's scales and codebook."""
        numbers = -(-self.shape[0] // _PANEL_ROWS) * _PANEL_ROWS * self.format.blocks_per_row(self.shape[1])
        return [numbers * _NUMBER_BYTES[self.format.scale_dtype], 4 << width]


def nested_matrices(source: CheckpointSource, names: Mapping[str, tuple[int, ...]]) -> dict[str, NestedMatrix]:
    """The nested ones among a checkpoint's tensors."""
    found = {}
    for name, shape in names.items():
        stored_as = source.tensors[name].stored_as if name in source.tensors else ""
        if len(shape) == 2 and NestedFormat.claims(stored_as):
            format = parse_format(stored_as)
            assert isinstance(format, NestedFormat)
            found[name] = NestedMatrix(format, (shape[0], shape[1]))
    return found


class Sections:
    """Writes nested matrices into a file.

    A matrix's planes go to places far apart, so they are collected in a second file beside it, and copied in the end in
    large pieces, as all else is written (kbit.backends.cpu.pieces says why).

    Args:
        collected: the second file, empty.
        begin: where in the file the first plane begins.
        matrices: all there are.
        ladder: of the model.

    Attributes:
        end: where the last scales end.
        index: what `stretches_read` wants to know: the matrices' names, and of every step the matrix (its place among
            these), the width, and where its planes and scales begin and end.
        places: of each matrix and width, what `_native.map_matrix` wants to know.
    """

    def __init__(self, collected: RawIOBase, begin: int, matrices: Mapping[str, NestedMatrix], ladder: Ladder) -> None:
        self._collected, self._begin, self._matrices = collected, begin, matrices
        self.places: dict[str, dict[str, Any]] = {name: {} for name in matrices}
        steps = ladder.all_steps({name: matrix.format.widths for name, matrix in matrices.items()})
        self._begins: dict[tuple[str, str, int], list[int]] = {}
        ends: dict[tuple[str, str, int], int] = {}
        at = begin
        for kind in ("planes", "scales"):
            for name, width in steps:
                begins = self._begins[kind, name, width] = []
                for size in getattr(matrices[name], kind)(width):
                    at += gap(at)
                    begins.append(at)
                    at += size
                ends[kind, name, width] = at
        self.end = at
        numbers = {name: number for number, name in enumerate(matrices)}
        self.index = {
            "matrices": list(matrices),
            "steps": [
                [numbers[name], width, *(
                    place
                    for kind in ("planes", "scales")
                    for place in (self._begins[kind, name, width][0], ends[kind, name, width])
                )]
                for name, width in steps
            ],
        }  # fmt: skip

    def write(self, name: str, stored: StoredNested, context: Context) -> None:
        """Prepares a matrix."""
        matrix = self._matrices[name]
        format = matrix.format
        planes = iter(self._planes(stored, context))
        begins: list[int] = []
        for width in reversed(format.widths):
            for at, size in zip(self._begins["planes", name, width], matrix.planes(width), strict=True):
                self._put(at, next(planes), size)
                begins.append(at)
            first, book = self._begins["scales", name, width]
            sizes = matrix.scales(width)
            self._put(first, _in_panels(stored.kernel_scales(width)), sizes[0])
            self._put(book, stored.levels(width), sizes[1])
            self.places[name][str(width)] = {
                "rows": matrix.shape[0],
                "columns": matrix.shape[1],
                "bits": width,
                "block_size": format.block_size,
                "kind": format.scale_dtype,
                "offsets": False,
                "begins": [begins[0], first, 0, book, *begins[1:]],
                "apart": width > 2,
            }

    def _put(self, at: int, array: NDArray[Any], size: int) -> None:
        data = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        assert data.nbytes == size
        self._collected.seek(at - self._begin)
        write_all(self._collected, data.data)

    def finish(self, file: RawIOBase) -> None:
        """Copies all of it into the file."""
        self._collected.truncate(self.end - self._begin)
        self._collected.seek(0)
        file.seek(at := self._begin)
        while at < self.end:
            piece = self._collected.read(min(PIECE_BYTES - at % PIECE_BYTES, self.end - at))
            assert piece  # a file that blocks, and is as long as it was just made
            write_all(file, memoryview(piece))
            at += len(piece)

    def _planes(self, stored: StoredNested, context: Context) -> list[NDArray[np.uint8]]:
        """All planes as kernels read them, from two bits up."""
        data, _, _, _, *further = _native.matrix_arrays(nested_matrix(stored, stored.format.bits, context))
        return [data, *further]


def _in_panels(scales: NDArray[Any]) -> NDArray[Any]:
    """Scales (N, blocks) as [panel][block][16 rows]."""
    rows, blocks = scales.shape
    padded = np.zeros((-(-rows // _PANEL_ROWS), _PANEL_ROWS, blocks), dtype=scales.dtype)
    padded.reshape(-1, blocks)[:rows] = scales
    return np.ascontiguousarray(padded.transpose(0, 2, 1))


def stretches_read(index: Mapping[str, Any], widths: Mapping[str, int] | None) -> list[tuple[int, int]]:
    """What of the planes and scales is read, (begin, end) each.

    Args:
        index: of `Sections`.
        widths: of every matrix, by name; None: the widest.

    Raises:
        KeyError, IndexError, TypeError, ValueError: the index of a damaged file.
    """
    planes: list[tuple[int, int]] = []
    scales: dict[int, tuple[int, int]] = {}  # of each matrix those of the last step taken
    for number, width, first, end, first_scale, end_scale in index["steps"]:
        if widths is None or width <= widths[index["matrices"][number]]:
            planes.append((int(first), int(end)))
            scales[number] = (int(first_scale), int(end_scale))
    return [*_joined(planes), *_joined(sorted(scales.values()))]


def _joined(stretches: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Those that lie one after another as one."""
    found: list[tuple[int, int]] = []
    for begin, end in stretches:
        if found and begin == found[-1][1] + gap(found[-1][1]):
            found[-1] = (found[-1][0], end)
        else:
            found.append((begin, end))
    return found
