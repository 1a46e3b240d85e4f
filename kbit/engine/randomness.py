"""Random numbers that depend on what they are for, not on what was drawn before."""

from __future__ import annotations

import numpy as np


class KeyedUniform:
    """Uniform numbers by (seed, choice, position, use): Philox 4x64 with ten rounds (Salmon et al. 2011, "Parallel
    random numbers: as easy as 1, 2, 3"), whose key is the seed and the choice, and whose counter the position and use.

    So a token's number is the same whatever ran beside it, and whether or not it was computed before.

    Args:
        seed, choice: from 0 to 2**64 - 1.
    """

    def __init__(self, seed: int, choice: int = 0) -> None:
        self._philox = np.random.Philox(key=np.array([seed, choice], dtype=np.uint64))
        self._state = self._philox.state

    def at(self, position: int, use: int = 0) -> float:
        """The number in [0, 1) of a position, with 53 random bits; another one for each use (from 0 to 2**64 - 1)."""
        self._state["state"]["counter"][:] = (position, use, 0, 0)
        self._philox.state = self._state
        return (int(self._philox.random_raw()) >> 11) * 2.0**-53
