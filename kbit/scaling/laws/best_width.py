"""Which width is best at a budget of total bits, and how sure that is.

Every draw of the text (laws.bootstrap) has its own curves of loss over total bits (laws.curves) and so
its own best width at every budget; the share of draws in which a width is the best is the probability reported. A width
stands for the best of its formats in that draw. What a curve says beyond its models is marked, and no conclusion rests
on it.

Two limits to keep in mind. The probability speaks of the text only: that the models of the family are as good as others
of their size would be is taken for granted (`BestWidths.without` shows what leaving out a model changes). And a width
with more formats measured has more chances to be the best.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kbit.scaling.laws.bootstrap import LEVEL, Array, Draws, interval
from kbit.scaling.laws.curves import AXES, Curve, bits_of, make_curves
from kbit.scaling.laws.suites import Suite
from kbit.scaling.points import Point

# Budgets looked at, evenly spaced in ln(bits).
BUDGETS = 41
# The data type that stands for the best of all.
ANY = "any"
# Differences of loss below this are of no account: 0.001 nats is 0.1 % of perplexity.
NEGLIGIBLE = 1e-3


@dataclass(frozen=True)
class Cell:
    """A width at a budget.

    Attributes:
        bits: the width; that of the model as it is where it was not quantized.
        nll, low, high: loss in nats per token.
        probability: that this width is the best here.
        extrapolated: whether the budget lies beyond the models the width was measured in.
        format: the format that is the width's best on the text as it is.
    """

    bits: int
    nll: float
    low: float
    high: float
    probability: float
    extrapolated: bool
    format: str


@dataclass(frozen=True)
class Budget:
    """A number of total bits.

    Attributes:
        bits: the budget.
        cells: the widths that reach here, narrowest first.
        best: the most probable width; None where fewer than two widths reach.
        supported: whether the best and the measured widths next to it are interpolated, not extrapolated.
    """

    bits: float
    cells: tuple[Cell, ...]
    best: int | None
    supported: bool


@dataclass(frozen=True)
class KStar:
    """A width, judged over the whole window of budgets.

    Attributes:
        bits: the width.
        probability: that its loss averaged over the window is the lowest.
        regret, regret_low, regret_high: that average less the best width's, nats per token; 0 for the best.
        tied: whether it cannot be told from the best: its regret's interval reaches 0, or is below NEGLIGIBLE
            throughout.
    """

    bits: int
    probability: float
    regret: float
    regret_low: float
    regret_high: float
    tied: bool


@dataclass(frozen=True)
class BestWidths:
    """The best widths of a method and data type.

    Attributes:
        axis: which bits count: "linear" layers, or "total", all that is stored.
        method, dtype: which; dtype ANY for the best of all data types.
        widths: measured, narrowest first.
        budgets: from the smallest point to the largest.
        k_star: the widths that compete over the window, best first; empty if there is no window.
        window: (lowest, highest) budget at which all that compete are interpolated; None if there is none.
        why: why there is none, or "".
        curved: the best width if curves are read as parabolas (Curve.read); None with fewer than three models.
        without: for every model that can be left out, its name and the best width without it (None: no answer).
    """

    axis: str
    method: str
    dtype: str
    widths: tuple[int, ...]
    budgets: tuple[Budget, ...]
    k_star: tuple[KStar, ...]
    window: tuple[float, float] | None
    why: str
    curved: int | None
    without: tuple[tuple[str, int | None], ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def best_widths(suite: Suite, draws: Draws, level: float = LEVEL) -> list[BestWidths]:
    """The best widths of every method and data type of a suite, on both axes.

    Args:
        suite: the points.
        draws: of all of them, in order.
        level: of the intervals.
    """
    found = []
    for axis in AXES:
        for method in suite.methods:
            own = [point for point in suite.points if point.method == method]
            for dtype in (ANY, *dict.fromkeys(point.dtype for point in own)):
                rows = [
                    index
                    for index, point in enumerate(suite.points)
                    if point.is_original or (point.method == method and dtype in (ANY, point.dtype))
                ]
                found.append(
                    _best_widths([suite.points[row] for row in rows], draws.only(rows), axis, method, dtype, level)
                )
    return found


def _best_widths(
    points: Sequence[Point], draws: Draws, axis: str, method: str, dtype: str, level: float, *, again: bool = True
) -> BestWidths:
    """`again`: also judge with parabolas and with each model left out."""
    curves = make_curves(points, axis, draws.nll[:, 0])
    widths = tuple(sorted({curve.bits for curve in curves}))
    sizes = [bits_of(point, axis) for point in points]
    models = {point.model_id: point.model for point in points}
    if len(models) < 2 or len(widths) < 2:
        why = "one width: nothing to compare it with" if len(models) > 1 else "one model: a curve needs two sizes"
        return BestWidths(axis, method, dtype, widths, (), (), None, why, None, ())
    grid = np.geomspace(min(sizes), max(sizes), BUDGETS)
    by_width = [[curve for curve in curves if curve.bits == width] for width in widths]
    read = [_read_width(own, draws.nll, np.log(grid)) for own in by_width]
    loss = np.array([values for values, _, _ in read])  # (K, G, 1 + R)
    outside = np.array([beyond for _, beyond, _ in read])  # (K, G), True where there is no value too
    formats = [names for _, _, names in read]
    budgets = tuple(_budget(float(bits), at, widths, loss, outside, formats, level) for at, bits in enumerate(grid))
    window, why = _window(budgets, widths, outside)
    if window is None:
        return BestWidths(axis, method, dtype, widths, budgets, (), None, why, None, ())
    contenders, span = window
    k_star = _judge([widths[index] for index in contenders], loss[contenders][:, span].mean(axis=1), level)
    limits = (float(grid[span[0]]), float(grid[span[-1]]))
    curved: int | None = None
    without: list[tuple[str, int | None]] = []
    if again and len(models) > 2:
        at = np.log(grid[span])
        bent = [_read_width(by_width[index], draws.nll[:, :1], at, curved=True)[0].mean() for index in contenders]
        curved = widths[contenders[int(np.argmin(bent))]]
        for identity, name in models.items():
            rows = [index for index, point in enumerate(points) if point.model_id != identity]
            some = Draws(draws.nll[rows, :1], draws.kl[rows, :1])
            rest = _best_widths([points[row] for row in rows], some, axis, method, dtype, level, again=False)
            without.append((name, rest.k_star[0].bits if rest.k_star else None))
    return BestWidths(axis, method, dtype, widths, budgets, k_star, limits, "", curved, tuple(without))


def _read_width(
    curves: Sequence[Curve], nll: Array, at: Array, curved: bool = False
) -> tuple[Array, NDArray[np.bool_], list[str]]:
    """A width's loss (G, 1 + R), NaN where it does not reach; whether extrapolated (G,); and its best format (G,).

    Formats that were measured around a budget go before formats that are extrapolated to it.
    """
    read = [curve.read(nll, at, curved) for curve in curves]
    values = np.array([value for value, _ in read])  # (F, G, 1 + R)
    beyond: NDArray[np.bool_] = np.array([outside for _, outside in read])  # (F, G)
    outside: NDArray[np.bool_] = np.all(beyond, axis=0)
    usable = np.where((beyond & ~outside)[:, :, None] | np.isnan(values), np.inf, values)
    best = usable.min(axis=0)
    names = [curves[int(index)].format for index in usable[:, :, 0].argmin(axis=0)]
    return np.where(np.isinf(best), np.nan, best), outside, names


def _budget(
    bits: float,
    at: int,
    widths: Sequence[int],
    loss: Array,
    outside: Array,
    formats: Sequence[Sequence[str]],
    level: float,
) -> Budget:
    present = [index for index in range(len(widths)) if np.isfinite(loss[index, at, 0])]
    if not present:
        return Budget(bits, (), None, False)
    here = loss[present, at]  # (K', 1 + R)
    wins = here[:, 1:].argmin(axis=0)
    cells = []
    for row, index in enumerate(present):
        low, high = interval(here[row], level)
        share = float(np.mean(wins == row)) if len(wins) else float(row == here[:, 0].argmin())
        name = formats[index][at]
        cells.append(Cell(widths[index], float(here[row, 0]), low, high, share, bool(outside[index, at]), name))
    if len(present) < 2:
        return Budget(bits, tuple(cells), None, False)
    best = present[max(range(len(cells)), key=lambda row: (cells[row].probability, -cells[row].nll))]
    around = range(max(0, best - 1), min(len(widths), best + 2))
    return Budget(bits, tuple(cells), widths[best], not any(outside[index, at] for index in around))


def _window(
    budgets: Sequence[Budget], widths: Sequence[int], outside: Array
) -> tuple[tuple[list[int], list[int]] | None, str]:
    """Which widths compete (as indices) and at which budgets all of them are interpolated.

    A width competes if it is the best at some supported budget, or stands next to one that is. If no budget has all of
    them, those around the width that is best most often compete.
    """
    supported = [widths.index(budget.best) for budget in budgets if budget.supported and budget.best is not None]
    if not supported:
        return None, "the sizes of the models lie too far apart, or are too few, for the widths to meet at any budget"
    most = max(set(supported), key=supported.count)
    for bests in (set(supported), {most}):
        contenders = sorted({near for best in bests for near in (best - 1, best, best + 1) if 0 <= near < len(widths)})
        span = [int(at) for at in np.flatnonzero(~outside[contenders].any(axis=0))]
        if span:
            return (contenders, span), ""
    return None, "no budget has all widths that compete"


def _judge(widths: Sequence[int], loss: Array, level: float) -> tuple[KStar, ...]:
    """Widths by their mean loss over the window, (K, 1 + R)."""
    best = int(loss[:, 0].argmin())
    wins = loss[:, 1:].argmin(axis=0)
    judged = []
    for index, width in enumerate(widths):
        regret = loss[index] - loss[best]
        low, high = (0.0, 0.0) if index == best else interval(regret, level)
        tied = index == best or low <= 0 or high < NEGLIGIBLE
        share = float(np.mean(wins == index)) if len(wins) else float(index == best)
        judged.append(KStar(width, share, float(regret[0]), low, high, tied))
    return tuple(sorted(judged, key=lambda star: star.regret))
