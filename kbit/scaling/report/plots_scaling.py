"""Loss against size: one line per width over the sizes of a family, as the paper draws it; panels; the frontier.

After Dettmers and Zettlemoyer, "The case for 4-bit precision" (2023), figures 1 to 4: at equal total bits, the lowest
line is the width to choose.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kbit.scaling.points import Point
from kbit.scaling.report import plots_style as style
from kbit.scaling.report.plots_data import KL_FLOOR, View, block_label, frontier

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Size = Callable[[Point], float]

# Bytes, since that is what memory is sold in; eight times as many are the paper's total bits.
AXES: dict[str, tuple[str, Size]] = {
    "total": ("whole model, as stored", lambda point: point.total_bits / 8),
    "linear": ("linear layers only", lambda point: point.linear_bits / 8),
}
# A loss further above the worst original is off the picture, for it would flatten everything that matters: this share
# of what lies between the originals, or this much (nats per token; a token of English is some four bytes).
_ABOVE_SHARE, _ABOVE_TOKEN, _ABOVE_BYTE = 0.35, 0.3, 0.08
_WIDE, _HIGH = 9.6, 4.4
_SIZE = "size (logarithmic)"


def loss_figure(view: View) -> Figure:
    """Loss against the bits of the whole model and of its linear layers, one line per width."""
    figure = style.new_figure(_WIDE, _HIGH)
    panels = figure.subplots(1, 2, sharey=True)
    for panel, (name, size) in zip(panels, AXES.values(), strict=True):
        width_lines(panel, view, size, view.loss)
        panel.set_title(name)
        _size_axis(panel, [size(point) for point in view.points])
    limits = loss_limits(view)
    for panel in panels:
        _clip(panel, view, limits)
    panels[0].set_ylabel(f"loss, {view.unit}")
    _second_axis(panels[1], view)
    _width_legend(figure, view)
    return figure


def kl_figure(view: View) -> Figure:
    """KL divergence from the original against bits, one line per width; both logarithmic."""
    figure = style.new_figure(_WIDE, _HIGH)
    panels = figure.subplots(1, 2, sharey=True)
    shown = view.without(lambda point: point.kl >= KL_FLOOR)
    for panel, (name, size) in zip(panels, AXES.values(), strict=True):
        width_lines(panel, shown, size, lambda point: point.kl, originals=False)
        panel.set_title(name)
        _size_axis(panel, [size(point) for point in shown.quantized])
    low, high = style.log_limits(
        [p.kl for m in shown.models for w in shown.widths if (p := shown.best(m, w)) is not None]
    )
    style.log_axis(panels[0].yaxis, style.plain, low=low, high=high)
    panels[0].set_ylabel("KL divergence from the original, nats per token")
    _width_legend(figure, shown, originals=False)
    return figure


def frontier_figure(view: View) -> Figure:
    """Every point measured, and the frontier: the best loss that a number of bits buys."""
    figure = style.new_figure(_WIDE, 5.2)
    axes = figure.subplots()
    size = AXES["total"][1]
    best = frontier(view, size)
    families = len({model.family for model in view.models}) > 1
    marks = dict(zip((model.label for model in view.models), style.marks(len(view.models)), strict=True))
    for model in view.models:
        for point in model.points:
            if point in view.points:
                on = point in best
                axes.plot(
                    size(point),
                    view.loss(point),
                    marks[model.label],
                    color=style.width_color(point.bits if not point.is_original else 0),
                    alpha=1.0 if on else 0.35,
                    markersize=7 if on else 4,
                    markeredgecolor="white" if on else "none",
                    markeredgewidth=0.8,
                    zorder=4 if on else 2,
                )
    steps_x = [size(point) for point in best]
    axes.step(
        [*steps_x, max(size(point) for point in view.points)],
        [*(view.loss(point) for point in best), view.loss(best[-1])],
        where="post",
        color=style.MUTED,
        linewidth=1.2,
        zorder=3,
    )
    low = min(size(point) for point in view.points)
    _size_axis(axes, [0.72 * low, *(size(point) for point in view.points)], most=8)
    limits = loss_limits(view)
    _clip(axes, view, limits, best_only=False)
    axes.set_ylabel(f"loss, {view.unit}" + (" (tokenizers differ)" if families and view.per_byte else ""))
    _frontier_labels(axes, view, [point for point in best if view.loss(point) <= limits[1]], size)
    _width_legend(figure, view, marks=marks)
    return figure


def panel_figure(view: View, facet: Callable[[Point], Any], title: Callable[[Any], str]) -> Figure:
    """One panel for each value of `facet` (data type, block size, method): loss against total bits, a line per
    width."""
    values = sorted({facet(point) for point in view.quantized}, key=lambda value: (isinstance(value, str), value))
    columns = min(3, len(values))
    rows = -(-len(values) // columns)
    figure = style.new_figure(_WIDE if columns > 1 else 6.4, 0.6 + 3.3 * rows)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    size = AXES["total"][1]
    limits = loss_limits(view)
    for index, value in enumerate(values):
        panel = grid[index // columns][index % columns]
        part = view.without(lambda point, value=value: facet(point) == value)  # type: ignore[misc]
        width_lines(panel, part, size, view.loss)
        panel.set_title(style.shown(title(value)))
        _clip(panel, part, limits)
    _size_axis(grid[0][0], [size(point) for point in view.points], most=5 if columns > 2 else 6)
    for index in range(len(values), rows * columns):
        grid[index // columns][index % columns].set_axis_off()
    for index in range(len(values)):  # the lowest panel of each column, above an empty place too
        last = index + columns >= len(values)
        grid[index // columns][index % columns].tick_params(labelbottom=last)
        grid[index // columns][index % columns].set_xlabel(_SIZE if last else "")
    for row in grid:
        row[0].set_ylabel(f"loss, {view.unit}")
    _width_legend(figure, view)
    return figure


def block_title(block_size: int) -> str:
    """A block size as a panel's title."""
    return block_label(block_size)


def width_lines(
    axes: Axes,
    view: View,
    size: Size,
    value: Callable[[Point], float],
    *,
    originals: bool = True,
) -> None:
    """A line for each width and family through its models' best points, and one for the originals."""
    for family in view.families:
        for width in view.widths:
            found = [point for model in family if (point := view.best(model, width)) is not None]
            axes.plot(
                [size(p) for p in found],
                [value(p) for p in found],
                color=style.width_color(width),
                marker=style.width_mark(width),
                markeredgecolor="white",
                markeredgewidth=0.6,
                zorder=3,
            )
        if originals:
            found = [p for model in family if (p := model.original) is not None and p in view.points]
            axes.plot(
                [size(p) for p in found], [value(p) for p in found], color=style.INK, marker="o", markersize=4,
                linestyle=(0, (4, 2)), linewidth=1.2, zorder=3,
            )  # fmt: skip


def loss_limits(view: View) -> tuple[float, float]:
    """Limits of the loss: all originals, and what is not much worse than the worst of them."""
    losses = [view.loss(point) for point in view.points]
    originals = [view.loss(model.original) for model in view.models if model.original in view.points and model.original]
    if not originals:
        originals = [min(losses)]
    least = _ABOVE_BYTE if view.per_byte else _ABOVE_TOKEN
    top = max(originals) + max(least, _ABOVE_SHARE * (max(originals) - min(originals)))
    highest = max((loss for loss in losses if loss <= top), default=max(losses))
    room = 0.05 * max(highest - min(losses), 1e-3)
    return min(losses) - room, highest + 1.6 * room


def _clip(axes: Axes, view: View, limits: tuple[float, float], best_only: bool = True) -> None:
    """Apply the limits, and say how many points lie above them."""
    axes.set_ylim(*limits)
    best = [p for model in view.models for width in view.widths if (p := view.best(model, width)) is not None]
    shown = best if best_only else list(view.quantized)
    above = [point for point in shown if view.loss(point) > limits[1]]
    if above:
        widths = sorted({point.bits for point in above})
        names = ", ".join(str(width) for width in widths)
        plural = "s" if len(above) > 1 else ""
        highest = max(view.loss(point) for point in above)
        axes.text(
            0.985, 0.985, f"{len(above)} point{plural} of {names} bits above, to {highest:.3g}",
            transform=axes.transAxes, fontsize=7, color=style.MUTED, va="top", ha="right", zorder=6,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5, "alpha": 0.85},
        )  # fmt: skip


def _size_axis(axes: Axes, values: list[float], most: int = 6, pad: float = 0.05) -> None:
    low, high = style.log_limits(values, pad)
    style.log_axis(axes.xaxis, style.size_label, low=low, high=high, most=most)
    axes.set_xlabel(_SIZE)


def _second_axis(axes: Axes, view: View) -> None:
    """Beside the loss, the same in the other unit people use: perplexity per token, or bits per byte."""
    import numpy as np
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    low, high = axes.get_ylim()
    if view.per_byte:
        ln2 = float(np.log(2))
        second = axes.secondary_yaxis("right", functions=(lambda x: np.asarray(x) / ln2, lambda x: np.asarray(x) * ln2))
        second.set_ylabel("bits per byte")
        second.yaxis.set_major_locator(MaxNLocator(6))
        return

    def back(x: Any) -> Any:
        return np.log(np.maximum(x, 1e-12))

    second = axes.secondary_yaxis("right", functions=(np.exp, back))
    second.set_ylabel("perplexity")
    ticks = style.log_ticks(float(np.exp(low)), float(np.exp(min(high, 600))))
    second.yaxis.set_major_locator(FixedLocator(ticks))
    second.yaxis.set_minor_locator(NullLocator())
    second.yaxis.set_major_formatter(FuncFormatter(lambda value, _: style.plain(value)))


def _width_legend(figure: Figure, view: View, originals: bool = True, marks: dict[str, str] | None = None) -> None:
    """Under the picture: widths by colour, and models by mark where marks stand for models."""
    from matplotlib.lines import Line2D

    def mark(color: str, shape: str, line: Any) -> Line2D:
        return Line2D([], [], color=color, marker=shape, linestyle=line, markeredgecolor="white", markeredgewidth=0.5)

    handles, labels = [], []
    for width in view.widths:
        shape = style.width_mark(width) if marks is None else "o"
        handles.append(mark(style.width_color(width), shape, "-" if marks is None else ""))
        labels.append(f"{width} bits")
    if originals and any(model.original for model in view.models):
        handles.append(mark(style.INK, "o", "--" if marks is None else ""))
        labels.append("original")
    if marks is None:
        figure.legend(
            handles, labels, loc="outside lower center", ncols=len(labels), columnspacing=1.4, handlelength=1.8
        )
        return
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), columnspacing=1.2, handletextpad=0.2)
    models = [Line2D([], [], color=style.MUTED, marker=shape, linestyle="") for shape in marks.values()]
    names = [style.shown(name) for name in marks]
    figure.legend(models, names, loc="outside right upper", handletextpad=0.2)


def _frontier_labels(axes: Axes, view: View, best: list[Point], size: Size) -> None:
    """Names of the points on the frontier, below and to the left, where nothing can be."""
    names = {id(point): model.label for model in view.models for point in model.points}
    placed: list[float] = []
    low, high = axes.get_xlim()
    span = math.log(high / low)
    for point in reversed(best):  # the best first: they are the ones to know
        place = math.log(size(point) / low) / span
        if any(abs(place - other) < 0.03 for other in placed):
            continue
        placed.append(place)
        what = "original" if point.is_original else point.format
        axes.annotate(
            f"{style.shown(names[id(point)], 18)} {style.shown(what, 16)}", (size(point), view.loss(point)),
            xytext=(-4, -6), textcoords="offset points", rotation=38, ha="right", va="top", rotation_mode="anchor",
            fontsize=7, color=style.INK, annotation_clip=False,
        )  # fmt: skip
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom - 0.3 * (top - bottom), top)
