"""Nested matrices in a file of prepared weights: every width reads a few stretches of it, and shares its memory.

What lies behind the arrays of all other tensors, for each width from the narrowest up:

    planes   of all nested matrices, one after another: those of the narrowest width, then one bit for each further one
    scales   of this width, each matrix's with its codebook

so width w needs the planes up to its own, which lie in few stretches, and its own scales: as many bytes as a plain file
of w bits has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from io import RawIOBase
from typing import TYPE_CHECKING, Any

import numpy as np

from kbit import _native
from kbit.backends.cpu.pieces import Pieces, gap
from kbit.backends.cpu.weight import nested_matrix
from kbit.formats.nested import NestedFormat
from kbit.formats.registry import parse_format
from kbit.formats.stored_nested import StoredNested

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kbit._native import Context
    from kbit.checkpoint.source import CheckpointSource

_PANEL_ROWS, _TILE_COLUMNS = 16, 64  # kernels/cpu/codecs/matrix.h
_NUMBER_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}
_PIECE_BYTES = 2 << 20  # there are two sections for each width


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
    """Writes nested matrices into a file, in the order of `matrices`.

    Args:
        file: the file.
        begin: where the first section begins.
        matrices: all there are.

    Attributes:
        end: where the last section ends.
        stretches: (begin, end) of the planes, and of the scales, of each width.
        places: of each matrix and width, what `_native.map_matrix` wants to know.
    """

    def __init__(self, file: RawIOBase, begin: int, matrices: Mapping[str, NestedMatrix]) -> None:
        self._matrices = matrices
        self.stretches: dict[str, dict[str, list[int]]] = {"planes": {}, "scales": {}}
        self.places: dict[str, dict[str, Any]] = {name: {} for name in matrices}
        self._writers: dict[tuple[str, int], Pieces] = {}
        at = begin
        for width in sorted({width for matrix in matrices.values() for width in matrix.format.widths}):
            for kind in ("planes", "scales"):
                self._writers[kind, width] = Pieces(file, at, _PIECE_BYTES)
                first = at
                for matrix in matrices.values():
                    if width in matrix.format.widths:
                        for size in getattr(matrix, kind)(width):
                            at += gap(at) + size
                self.stretches[kind][str(width)] = [first, at]
        self.end = at

    def write(self, name: str, stored: StoredNested, context: Context) -> None:
        """Prepares the next matrix."""
        matrix = self._matrices[name]
        format = matrix.format
        planes = self._planes(stored, context)
        begins: list[int] = []
        for width in reversed(format.widths):
            for size in matrix.planes(width):
                plane = planes[len(begins)]
                assert plane.nbytes == size
                begins.append(self._writers["planes", width].append(plane))
            writer = self._writers["scales", width]
            scales, codebook = _in_panels(stored.kernel_scales(width)), stored.levels(width)
            assert [scales.nbytes, codebook.nbytes] == matrix.scales(width)
            first = writer.append(scales.view(np.uint8).reshape(-1))
            book = writer.append(np.ascontiguousarray(codebook).view(np.uint8))
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

    def _planes(self, stored: StoredNested, context: Context) -> list[NDArray[np.uint8]]:
        """All planes as kernels read them, from two bits up."""
        data, _, _, _, *further = _native.matrix_arrays(nested_matrix(stored, stored.format.bits, context))
        return [data, *further]

    def finish(self) -> None:
        """Writes what is left."""
        for writer in self._writers.values():
            writer.flush()


def _in_panels(scales: NDArray[Any]) -> NDArray[Any]:
    """Scales (N, blocks) as [panel][block][16 rows]."""
    rows, blocks = scales.shape
    padded = np.zeros((-(-rows // _PANEL_ROWS), _PANEL_ROWS, blocks), dtype=scales.dtype)
    padded.reshape(-1, blocks)[:rows] = scales
    return np.ascontiguousarray(padded.transpose(0, 2, 1))


def stretches_read(stretches: Mapping[str, Mapping[str, list[int]]], width: int) -> list[tuple[int, int]]:
    """What of the sections a width reads, (begin, end) each.

    Raises:
        KeyError, TypeError, ValueError: the index of a damaged file.
    """
    planes = [(int(begin), int(end)) for key, (begin, end) in stretches["planes"].items() if int(key) <= width]
    begin, end = stretches["scales"][str(width)]
    return [*planes, (int(begin), int(end))]
