"""Weights that are held dequantized, whose blocks have few values each: a table of these, looked up by code.

A library's roundings then happen once for each value that a block can have, and not for each of its weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kbit.checkpoint.packed.weight import DequantizedWeight
from kbit.formats.stored import rounded


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
class LevelWeight(DequantizedWeight):
    """A weight whose rows are codes and what they stand for.

    Attributes:
        read: rows (start, stop) -> what they are.
    """

    read: Callable[[int, int], Levels]

    def read_into(self, start: int, stop: int, out: NDArray[Any]) -> None:
        from kbit import _native

        found = self.read(start, stop)
        table = np.ascontiguousarray(rounded(found.values, self.kind))
        _native.look_up_levels(np.ascontiguousarray(found.codes), table, found.block_of, out)
