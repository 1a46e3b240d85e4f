"""Weights that are held dequantized, whose blocks have few values each: a table of these, looked up by code.

A library's roundings then happen once for each value that a block can have, and not for each of its weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kbit.checkpoint.packed.weight import KIND_NAMES, PackedWeight, chunks
from kbit.formats.stored import DenseMatrix, rounded, widened


@dataclass(frozen=True)
class Levels:
    """Some rows.

    Attributes:
        codes: uint8 (R, K).
        values: float32 (R, blocks, 2^bits): what a block's codes stand for.
        block_of: int32 (K,): the block of every column; None: they stand side by side.
    """

    codes: NDArray[np.uint8]
    values: NDArray[np.float32]
    block_of: NDArray[np.int32] | None = None


def pays(bits: int, block: int) -> bool:
    """Whether a block has fewer values than weights."""
    return 1 << bits <= block


@dataclass
class LevelWeight(PackedWeight):
    """A weight that is held dequantized.

    Attributes:
        kind: the type that the library computes in: its values are rounded to it.
        read: rows (start, stop) -> what they are.
    """

    name: str
    shape: tuple[int, int]
    parts: tuple[str, ...]
    label: str
    kind: str
    read: Callable[[int, int], Levels]

    @property
    def held_as(self) -> str:
        return KIND_NAMES[self.kind]

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        return widened(self._patterns(start, stop), self.kind)

    def stored(self) -> DenseMatrix:
        return DenseMatrix(self._patterns(0, self.shape[0]), self.kind)

    def _patterns(self, start: int, stop: int) -> NDArray[Any]:
        from kbit import _native

        columns = self.shape[1]
        out = np.empty((stop - start, columns), dtype=np.float32 if self.kind == "fp32" else np.uint16)
        for begin, end in chunks(start, stop, columns):
            found = self.read(begin, end)
            table = np.ascontiguousarray(rounded(found.values, self.kind))
            codes = np.ascontiguousarray(found.codes)
            _native.look_up_levels(codes, table, found.block_of, out[begin - start : end - start])
        return out
