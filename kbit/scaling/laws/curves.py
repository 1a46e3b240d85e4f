"""Curves of loss over total bits: one per format, through the models it was measured in.

The paper's way to compare widths at a number of total bits at which nobody trained a model: linear interpolation of the
score over the logarithm of the total bits (Dettmers and Zettlemoyer, "The case for 4-bit precision", 2023, section 4).
It found power laws in both N and k to fit poorly, and interpolation assumes no law.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kbit.scaling.laws.bootstrap import Array
from kbit.scaling.points import Point

AXES = ("linear", "total")
# A curve is continued beyond its last model, straight, by at most this factor in bits, and what is read there is
# marked.
# Families step in size by 2 to 3: this reaches about the next size that was not measured.
REACH = 2.0
# Width from which a model as it is counts as a choice of its own, not as some quantization that its maker chose.
UNQUANTIZED_BITS = 16


def bits_of(point: Point, axis: str) -> int:
    """Bits of a point: of its linear layers ("linear", what the paper counts) or of all that is stored ("total")."""
    return point.linear_bits if axis == "linear" else point.total_bits


@dataclass(frozen=True, eq=False)
class Curve:
    """A format over the models.

    Attributes:
        method, format, dtype, bits: of the format.
        x: ln(total bits), ascending, no two equal.
        rows: which points, as indices.
    """

    method: str
    format: str
    dtype: str
    bits: int
    x: Array
    rows: tuple[int, ...]

    def read(self, values: Array, at: Array, curved: bool = False) -> tuple[Array, Array]:
        """The curve at ln(total bits) `at` (G,), from one row of values (P, R) for each point.

        Args:
            curved: between models, read a parabola through the two and the nearest third instead of a line. A line
                through two points of a convex curve lies above it; where the two readings differ, the sizes are too far
                apart.

        Returns:
            Values (G, R), NaN beyond REACH; and whether each is extrapolated, bool (G,).
        """
        y = values[list(self.rows)]
        reach = math.log(REACH)
        outside = np.maximum(self.x[0] - at, at - self.x[-1])
        if len(self.x) == 1:  # a point, not a curve: it says nothing of other sizes
            exact = outside <= 1e-9
            return np.where(exact[:, None], y[0], np.nan), ~exact
        segment = np.clip(np.searchsorted(self.x, at) - 1, 0, len(self.x) - 2)
        share = (at - self.x[segment]) / (self.x[segment + 1] - self.x[segment])
        result = y[segment] * (1 - share)[:, None] + y[segment + 1] * share[:, None]
        if curved and len(self.x) > 2:
            inside = outside <= 0
            result[inside] += self._bend(y, at[inside], segment[inside])
        result[outside > reach] = np.nan
        return result, outside > 1e-9

    def _bend(self, y: Array, at: Array, segment: NDArray[np.intp]) -> Array:
        """What a parabola adds to the line: the second divided difference times (x - x1)(x - x2)."""
        left, right = self.x[segment], self.x[segment + 1]
        before, after = np.maximum(segment - 1, 0), np.minimum(segment + 2, len(self.x) - 1)
        has_before, has_after = segment > 0, segment + 2 < len(self.x)
        nearer = has_before & (~has_after | (at - self.x[before] < self.x[after] - at))
        third = np.where(nearer, before, after)
        slope = (y[segment + 1] - y[segment]) / (right - left)[:, None]
        to_third = (y[third] - y[segment + 1]) / (self.x[third] - right)[:, None]
        second = (to_third - slope) / (self.x[third] - left)[:, None]
        bend: Array = second * ((at - left) * (at - right))[:, None]
        return bend


def make_curves(points: Sequence[Point], axis: str, nll: Array) -> list[Curve]:
    """The curves of a suite's points. Of two models of equal total bits the one with the lower loss is taken.

    Args:
        points: P of them, of one suite.
        axis: one of AXES.
        nll: (P,) losses.
    """
    groups: dict[tuple[str, str], list[int]] = {}
    for index, point in enumerate(points):
        if not point.is_original or point.bits >= UNQUANTIZED_BITS:
            groups.setdefault((point.method, point.format), []).append(index)
    curves = []
    for rows in groups.values():
        best: dict[int, int] = {}
        for index in rows:
            size = bits_of(points[index], axis)
            if size not in best or nll[index] < nll[best[size]]:
                best[size] = index
        kept = tuple(best[size] for size in sorted(best))
        first = points[kept[0]]
        x = np.log([float(bits_of(points[index], axis)) for index in kept])
        curves.append(Curve(first.method, first.format, first.dtype, first.bits, x, kept))
    return curves
