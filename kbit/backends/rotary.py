"""Rotary cosines and sines as the native and the Triton runner take them: tables with a row per token or position.

Angles are computed in blocks of BLOCK consecutive positions that begin at a multiple of BLOCK. Vectorized cosines treat
the end of an array otherwise than its middle, so without this the last bit of a position's angle could depend on which
other positions were asked for with it, and a text could read differently in other pieces.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kbit.graph.backend import Definition
from kbit.graph.batch import Batch

BLOCK = 64
# Rows of the first table by position, which then doubles.
FIRST_POSITIONS = 16 * BLOCK

Table = tuple[NDArray[np.float32], NDArray[np.float32]]


class RotaryTable:
    """Cosines and sines of one model, float32 (rows, R/2) each.

    Where the rotation depends on the position alone, there is one table by position, which is kept and grows by
    doubling.

    Args:
        definition: the model.
    """

    def __init__(self, definition: Definition) -> None:
        self._definition = definition
        self.by_length = definition.rotation_depends_on_length
        self._end = 0
        self._table: Table = (np.empty((0, 0), dtype=np.float32), np.empty((0, 0), dtype=np.float32))

    def of_batch(self, batch: Batch) -> tuple[Table, NDArray[np.int32]]:
        """A table, and which of its rows is each token's: int32 (R,)."""
        if self.by_length:
            return self.of_spans(batch.starts, batch.lengths), np.arange(len(batch), dtype=np.int32)
        return self.by_position(int(batch.lengths.max())), batch.positions

    def by_position(self, stop: int) -> Table:
        """A table whose row p is position p, for positions [0, stop) at least. Not for a rotation by length."""
        if stop > self._end:
            end = max(stop, 2 * self._end, FIRST_POSITIONS)
            end += -end % BLOCK
            new = self._blocks(self._end, end, end)
            self._table = _joined([self._table, new]) if self._end else new
            self._end = end
        return self._table

    def of_spans(self, starts: NDArray[np.int64], stops: NDArray[np.int64]) -> Table:
        """A table with a row for every new token of some sequences, in order.

        Args:
            starts: (B,), tokens each sequence had.
            stops: (B,), tokens it has with the new ones: their positions are [start, stop).
        """
        tables = []
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
            if start == stop:
                continue
            first = start - start % BLOCK
            cos, sin = self._blocks(first, stop, stop)
            tables.append((cos[start - first : stop - first], sin[start - first : stop - first]))
        return _joined(tables)

    def _blocks(self, first: int, stop: int, length: int) -> Table:
        """Whole blocks from `first`, a multiple of BLOCK, to `stop` at least, of a sequence of `length` tokens."""
        lengths = np.array([length])
        tables = []
        for begin in range(first, stop, BLOCK):
            cos, sin = self._definition.rotation(np.arange(begin, begin + BLOCK)[None], lengths)
            tables.append((cos[0], sin[0]))  # (BLOCK, R/2)
        return _joined(tables)


def _joined(tables: Sequence[Table]) -> Table:
    return np.concatenate([cos for cos, _ in tables]), np.concatenate([sin for _, sin in tables])
