"""What the laws say, drawn: the probability of each width of being the best, and how well held-out points were
predicted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kbit.scaling.points import ORIGINAL
from kbit.scaling.report import plots_style as style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from kbit.scaling.laws.best_width import BestWidths
    from kbit.scaling.laws.fit import SuiteLaws
    from kbit.scaling.laws.heldout import HeldOut

_MOST_PANELS = 4
_AXES = {"total": "whole model", "linear": "linear layers"}
# What law fits are to stay within, as a share of the loss (the goal of the laboratory).
_GOAL = 0.02
# Smaller errors are drawn as this: 0.001 %.
_LEAST_ERROR = 1e-5


def best_width_figure(laws: SuiteLaws) -> Figure | None:
    """P(k is the best width) over budgets, stacked: rows by what counts as size, columns by method and data type.

    None where no budget has enough models.
    """
    shown = [
        best
        for best in laws.best
        if best.budgets and any(cell.probability > 0 for b in best.budgets for cell in b.cells)
    ]
    columns = _columns(shown)
    rows = [axis for axis in _AXES if any(best.axis == axis for best in shown)]
    if not columns or not rows:
        return None
    figure = style.new_figure(max(6.0, 0.8 + 2.7 * len(columns)), 0.9 + 2.3 * len(rows))
    grid = figure.subplots(len(rows), len(columns), squeeze=False, sharey=True, sharex="row")
    methods = {method for method, _ in columns}
    for row, axis in enumerate(rows):
        for column, (method, dtype) in enumerate(columns):
            panel = grid[row][column]
            found = next((b for b in shown if (b.axis, b.method, b.dtype) == (axis, method, dtype)), None)
            if found is None:
                panel.set_axis_off()
                continue
            _areas(panel, found)
            name = "best of all data types" if dtype == "any" else dtype
            if row == 0:
                panel.set_title(style.shown(name if len(methods) == 1 else f"{method}, {name}"))
            panel.set_xlabel(f"size, {_AXES[axis]}")
            if column == 0:
                panel.set_ylabel("probability of being best")
    _legend(figure, sorted({width for best in shown for width in best.widths}))
    return figure


def heldout_figure(laws: SuiteLaws) -> Figure | None:
    """Errors of predicted losses on points that a fit had not seen, by what was left out; None where nothing was.

    Of the method with most points; the median over all points, and the worst from 3 bits on where that is known.
    """
    rows = [row for row in laws.heldout if row.count > 0 and row.method != ORIGINAL and np.isfinite(_errors(row)).all()]
    if not rows:
        return None
    method = max({row.method for row in rows}, key=lambda name: max(row.count for row in rows if row.method == name))
    rows = [row for row in rows if row.method == method]
    kinds = list(dict.fromkeys(row.left_out for row in rows))
    forms = list(dict.fromkeys(row.form for row in rows))
    hues = dict(zip(forms, style.colors(len(forms)), strict=True))
    figure = style.new_figure(8.6, 1.2 + 0.095 * (len(forms) + 0.5) * len(kinds))
    axes = figure.subplots()
    for row in rows:
        low, high = (100 * max(error, _LEAST_ERROR) for error in _errors(row))
        beside = [form for form in forms if any(r.form == form and r.left_out == row.left_out for r in rows)]
        place = kinds.index(row.left_out) + 0.13 * (beside.index(row.form) - (len(beside) - 1) / 2)
        axes.plot([low, high], [place, place], color=hues[row.form], linewidth=1.3, alpha=0.55)
        axes.plot(low, place, "o", color=hues[row.form], markersize=4.5)
        axes.plot(high, place, "o", color=hues[row.form], markerfacecolor="white", markersize=4.5)
    axes.set_yticks(range(len(kinds)), [style.shown(kind, 60).replace(", its", ",\nits") for kind in kinds])
    axes.set_ylim(len(kinds) - 0.4, -0.6)
    for edge in np.arange(0.5, len(kinds) - 1):
        axes.axhline(edge, color="#e6e8ec", linewidth=0.8)
    low, high = style.log_limits([100 * max(e, _LEAST_ERROR) for row in rows for e in (*_errors(row), _GOAL)])
    style.log_axis(axes.xaxis, lambda value: f"{style.plain(value)} %", low=low, high=high, most=7)
    axes.axvline(100 * _GOAL, color=style.INK, linewidth=1.0, linestyle=(0, (4, 2)), zorder=1)
    axes.set_xlabel("error of the predicted loss: median (filled) to the worst from 3 bits on (hollow)")
    axes.set_ylabel("left out")
    axes.grid(visible=False, axis="y")
    _form_legend(figure, hues)
    return figure


def _errors(row: HeldOut) -> tuple[float, float]:
    """Median over all points, worst from 3 bits on (of all where none has so many)."""
    return row.median, row.worst if row.near_worst is None else row.near_worst


def _form_legend(figure: Figure, hues: dict[str, str]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=hue, marker="o", markersize=4.5) for hue in hues.values()]
    names = [style.shown(name) for name in hues]
    figure.legend(handles, names, loc="outside lower center", ncols=min(8, len(names)), columnspacing=1.3)


def _columns(shown: Sequence[BestWidths]) -> list[tuple[str, str]]:
    """Methods and data types to show: the best of all types of each method first, then single types while there is
    room."""
    pairs = list(dict.fromkeys((best.method, best.dtype) for best in shown))
    return sorted(pairs, key=lambda pair: pair[1] != "any")[:_MOST_PANELS]


def _areas(axes: Axes, best: BestWidths) -> None:
    """Probabilities of the widths stacked over the budgets; what is extrapolated is veiled."""
    sizes = np.array([budget.bits / 8 for budget in best.budgets])
    shares = {width: np.zeros(len(sizes)) for width in best.widths}
    for place, budget in enumerate(best.budgets):
        for cell in budget.cells:
            shares[cell.bits][place] = cell.probability
    widths = sorted(shares)
    axes.stackplot(
        sizes,
        np.array([shares[width] for width in widths]),
        colors=[style.width_color(width) for width in widths],
        edgecolor="white",
        linewidth=0.5,
    )
    for start, stop in _runs([not budget.supported for budget in best.budgets]):
        low, high = _edge(sizes, start), _edge(sizes, stop)
        axes.axvspan(low, high, facecolor="white", alpha=0.62, edgecolor="none", zorder=3)
        axes.axvspan(low, high, facecolor="none", hatch="////", edgecolor="#c4c8cf", linewidth=0.0, zorder=3)
    if len(sizes) > 1 and sizes[0] > 0:
        style.log_axis(axes.xaxis, style.size_label, low=float(sizes[0]), high=float(sizes[-1]), most=4)
    axes.set_ylim(0, 1)
    axes.grid(visible=False)
    _name_areas(axes, sizes, shares, np.array([budget.supported for budget in best.budgets]))


def _name_areas(
    axes: Axes, sizes: NDArray[np.float64], shares: dict[int, NDArray[np.float64]], supported: NDArray[np.bool_]
) -> None:
    """The width's number inside its area, where that is high and wide enough to hold it, and not extrapolated."""
    bottom = np.zeros(len(sizes))
    for width in sorted(shares):
        height = shares[width]
        runs = _runs([bool(tall) for tall in (height > 0.3) & supported])
        runs = [(start, stop) for start, stop in runs if stop - start > 0.07 * len(sizes)]
        if runs:
            start, stop = max(runs, key=lambda run: float(height[run[0] : run[1]].sum()))
            x = float(np.exp(np.average(np.log(sizes[start:stop]), weights=height[start:stop])))
            place = int(np.argmin(np.abs(sizes - x)))
            axes.text(
                sizes[place], bottom[place] + height[place] / 2, str(width), ha="center", va="center", fontsize=9,
                color=style.INK if width in (7, 8) else "white", fontweight="bold", zorder=5,
            )  # fmt: skip
        bottom = bottom + height


def _runs(flags: list[bool]) -> list[tuple[int, int]]:
    """[start, stop) of every unbroken run of true."""
    edges = np.flatnonzero(np.diff([0, *map(int, flags), 0]))
    return [(int(start), int(stop)) for start, stop in zip(edges[::2], edges[1::2], strict=True)]


def _edge(sizes: NDArray[np.float64], index: int) -> float:
    """Half way between two budgets (geometrically); the ends themselves outside."""
    if index <= 0 or index >= len(sizes):
        return float(sizes[0] if index <= 0 else sizes[-1])
    return float(np.sqrt(sizes[index - 1] * sizes[index]))


def _legend(figure: Figure, widths: Sequence[int]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=style.width_color(width), label=_width_name(width)) for width in widths]
    handles.append(Patch(facecolor="#f4f5f7", edgecolor="#c4c8cf", hatch="////", linewidth=0.0, label="extrapolated"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), columnspacing=1.3, handlelength=1.2)


def _width_name(width: int) -> str:
    return f"{width} bits" if width <= 8 else f"original ({width} bits)"
