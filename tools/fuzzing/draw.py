"""Bytes as choices: numbers, arrays and other arguments, most of them right, some of them not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")

_NUMBERS = (-1, 0, 1, 2, 3, 15, 16, 17, 255, 256, 1 << 15, (1 << 31) - 1, 1 << 31, 1 << 32, 1 << 40, (1 << 63) - 1)
_OTHER: tuple[Any, ...] = (None, "", "x", 1.5, [], [None], b"abc", object(), float("nan"), -(1 << 63), 1 << 64)
_DTYPES = ("u1", "i1", "u2", "i4", "i8", "f2", "f4", "f8", "?")


class Draw:
    """Choices that a run of bytes makes; zeros where it is at its end.

    Args:
        data: the bytes.
        wrong: of 256 arguments about so many are wrong.
    """

    def __init__(self, data: bytes, wrong: int = 12) -> None:
        self._data, self._at, self._wrong = data, 0, wrong

    def byte(self) -> int:
        """The next one."""
        self._at += 1
        return self._data[self._at - 1] if self._at <= len(self._data) else 0

    def below(self, most: int) -> int:
        """A number from 0 to `most` - 1."""
        return (self.byte() if most <= 256 else self.byte() << 8 | self.byte()) % most

    def size(self, most: int = 40) -> int:
        """A number from 1 on."""
        return 1 + self.below(most)

    def choice(self, values: Sequence[T]) -> T:
        """One of some."""
        return values[self.below(len(values))]

    def amiss(self) -> bool:
        """Whether the next argument is to be wrong."""
        return self.byte() >= 256 - self._wrong

    def given(self, value: Any) -> Any:
        """An argument, or another one in its place."""
        if not self.amiss():
            return value
        return self.choice((*_NUMBERS, *_OTHER)) if not isinstance(value, str) else self.choice((*_OTHER, value + "x"))

    def floats(self, *shape: int) -> Any:
        """float32, some of them large, infinite or no numbers."""
        return self.array(shape, "f4")

    def array(self, shape: Sequence[int], dtype: str, below: int = 0, low: int = 0) -> Any:
        """An array, or one of another shape, type or order.

        Args:
            shape: what is expected.
            dtype: what is expected.
            below: of whole numbers: all of them are less, and at least `low`.
        """
        if self.amiss():
            kind = self.below(6)
            if kind == 0:
                shape = [max(0, dim + self.choice((-1, 1, 16, -dim))) for dim in shape]
            elif kind == 1:
                dtype = self.choice(_DTYPES)
            elif kind == 2:
                return self._values((*shape[:-1], 2 * shape[-1]), dtype, below, low)[..., ::2] if shape else None
            elif kind == 3:
                return np.asfortranarray(self._values(shape, dtype, below, low))
            elif kind == 4:
                shape = (*shape, 1)
            else:
                return self.choice(_OTHER)
            below = 0 if self.below(2) else below
        return self._values(shape, dtype, below, low)

    def _values(self, shape: Sequence[int], dtype: str, below: int, low: int) -> NDArray[Any]:
        generator = np.random.default_rng(self.byte())
        if dtype[0] == "f":
            values = generator.standard_normal(tuple(shape)).astype(dtype)
            if values.size and self.byte() >= 240:
                values.flat[self.below(values.size)] = self.choice((np.inf, -np.inf, np.nan, 3e38, 1e-40, 0.0))
            return values
        most = below or {"u1": 256, "u2": 1 << 16, "?": 2, "i1": 128}.get(dtype, 1 << 31)
        drawn = generator.integers(low if below else 0, most, tuple(shape))
        if below and drawn.size and self.byte() >= 250:
            drawn.flat[self.below(drawn.size)] = self.choice((0, -1, below, 200, 1 << 30))
        return drawn.astype(dtype)
