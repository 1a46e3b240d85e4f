"""Answers that go round in circles."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# An answer only repeats itself when its last tokens are one piece of at most so many, so many times, and so many in
# all.
_LONGEST_PIECE, _FEWEST_TIMES, _FEWEST_TOKENS = 64, 4, 96


def only_repeats(ids: Sequence[int]) -> bool:
    """Whether an answer ends in nothing but repetitions of one piece."""
    tail = np.array(ids[-_LONGEST_PIECE * _FEWEST_TIMES :], dtype=np.int64)
    for piece in range(1, _LONGEST_PIECE + 1):
        needed = max(piece * _FEWEST_TIMES, _FEWEST_TOKENS)
        if needed > len(tail):
            continue
        if np.array_equal(tail[len(tail) - needed + piece :], tail[len(tail) - needed : -piece]):
            return True
    return False
