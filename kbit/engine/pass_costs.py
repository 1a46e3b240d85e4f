"""What passes of a model cost, in those of one token: by what their weights weigh, or by the clock.

By the clock only where the tokens do not depend on what is drafted, as in greedy text: else the same seed would not
give the same text twice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

# A pass over one to eight tokens (Qwen2.5-Coder 0.5B, 8 bits in planes, int8, Zen 5; docs/speculation.md), and what
# every further eight add: kernels decode weights once for up to four rows, or eight.
_ROWS = (1.0, 1.045, 1.14, 1.24, 1.53, 1.60, 1.67, 1.73)
_EIGHT = 1.6
# Of passes of a kind so many are remembered, and so many needed. A low quantile of them counts, as what disturbs a pass
# makes it longer, never shorter.
_REMEMBERED, _NEEDED, _QUANTILE = 16, 2, 0.25
# The clock is believed up to this factor either way.
_MOST = 2.0


def rows_cost(rows: int) -> float:
    """The cost of a pass over so many tokens."""
    eights, rest = divmod(rows - 1, 8)
    return _EIGHT * eights + _ROWS[rest]


class PassClock:
    """Times of passes, by which their costs are corrected.

    Args:
        widths: how many widths draft.
    """

    def __init__(self, widths: int) -> None:
        self._one: deque[float] = deque(maxlen=_REMEMBERED)  # seconds of passes of one token
        self._more: deque[tuple[int, float]] = deque(maxlen=_REMEMBERED)  # of others: tokens, seconds
        self._drafted: list[deque[float]] = [deque(maxlen=_REMEMBERED) for _ in range(widths)]

    @property
    def knows_one(self) -> bool:
        """Whether enough passes of one token were timed."""
        return len(self._one) >= _NEEDED

    def checked(self, rows: int, seconds: float) -> None:
        """A pass of the model over so many tokens."""
        if rows == 1:
            self._one.append(seconds)
        else:
            self._more.append((rows, seconds))

    def drafted(self, width: int, seconds: float) -> None:
        """A pass of a width, by its index, over one token."""
        self._drafted[width].append(seconds)

    def dearness(self) -> float:
        """What tokens beyond a pass's first take, over what `rows_cost` says of them."""
        if not self.knows_one or len(self._more) < _NEEDED:
            return 1.0
        one = _low(self._one)
        return _believed(_low([(seconds / one - 1) / (rows_cost(rows) - 1) for rows, seconds in self._more]))

    def cost(self, width: int, expected: float) -> float:
        """Of a token that a width drafts.

        Args:
            width: its index.
            expected: by its weights.
        """
        if not self.knows_one or len(self._drafted[width]) < _NEEDED:
            return expected
        dearness = self.dearness()
        full = [*self._one, *(seconds / (1 + dearness * (rows_cost(rows) - 1)) for rows, seconds in self._more)]
        return expected * _believed(_low(self._drafted[width]) / _low(full) / expected)


def _low(values: Sequence[float] | deque[float]) -> float:
    return sorted(values)[int(_QUANTILE * (len(values) - 1))]


def _believed(ratio: float) -> float:
    return min(max(ratio, 1 / _MOST), _MOST)
