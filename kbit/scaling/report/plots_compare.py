"""What differs between formats of the same width: KL against bits per weight, data types, block sizes, weight error.

KL divergence from the model's own original, since it sees the whole distribution and the text's difficulty cancels;
with 95 % intervals from the cluster bootstrap. Ratios are of the same clusters of text: far surer than the values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from kbit.scaling.points import Point
from kbit.scaling.report import plots_style as style
from kbit.scaling.report.plots_data import (
    KL_FLOOR,
    Model,
    Ratio,
    View,
    block_label,
    interval,
    kl_draws,
    kl_ratio,
    kl_ratio_at_equal_bits,
    most_common,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Kind = TypeVar("Kind", str, int)

# Columns that a picture has room for; of more models, some evenly spread over the sizes are shown.
MOST_COLUMNS = 4
_BASE_DTYPES = ("int", "nf", "float")
# Widths at which data types and block sizes matter (the paper, section 5: nothing helps from 6 bits on).
_LOW_BITS = 5
_KL = "KL divergence, nats per token"
# Squared error, and with it KL, falls fourfold a bit where steps halve.
_PER_BIT = 4.0
# Ticks above 1 of an axis of ratios that reaches so far; their inverses stand below.
_RATIO_TICKS = (
    (1.3, (1.05, 1.1, 1.15, 1.2, 1.25)),
    (1.8, (1.1, 1.2, 1.4, 1.6)),
    (3.2, (1.2, 1.5, 2.0, 3.0)),
    (12.0, (1.5, 2.0, 3.0, 5.0, 10.0)),
    (math.inf, (3.0, 10.0, 30.0, 100.0, 1000.0)),
)


def bits_figure(view: View) -> Figure:
    """KL against bits per weight: a line per model through its best format at each width."""
    figure = style.new_figure(7.2, 4.8)
    axes = figure.subplots()
    models = [model for model in view.models if _measurable(model.quantized)]
    drawn: list[Point] = []
    for model, color, mark in zip(models, style.ordered_colors(len(models)), style.marks(len(models)), strict=True):
        best = _measurable([p for width in view.widths if (p := view.best(model, width)) is not None])
        _kl_line(axes, best, color, mark, style.shown(model.label))
        drawn += best
    low, high = style.log_limits([point.kl for point in drawn])
    style.log_axis(axes.yaxis, style.plain, low=low, high=high)
    middle = sorted(drawn, key=lambda point: point.bits_per_weight)[len(drawn) // 2]
    ends = [min(p.bits_per_weight for p in drawn), max(p.bits_per_weight for p in drawn)]
    guide = [middle.kl * _PER_BIT ** (middle.bits_per_weight - end) for end in ends]
    axes.plot(
        ends, guide, color=style.MUTED, linestyle=(0, (1, 2)), linewidth=1.2, zorder=1, label="4 times less a bit"
    )
    axes.set_xlabel("bits per weight of the linear layers, scales included")
    axes.set_ylabel(_KL)
    axes.legend(loc="upper right")
    return figure


def dtype_figure(view: View) -> Figure | None:
    """Data types at equal width and block size: KL, and its ratio to that of a base type, model by model.

    Of the block size and the method with most points; None where these have a single data type.
    """
    block = most_common(point.block_size for point in view.quantized)
    method = most_common(point.method for point in view.quantized)
    part = view.without(lambda point: point.block_size == block and point.method == method)
    names = sorted({point.dtype for point in _measurable(part.quantized)})
    if len(names) < 2:
        return None
    base = next((name for name in _BASE_DTYPES if name in names), names[0])

    def ratio(point: Point, others: dict[int, Point]) -> Ratio | None:
        return kl_ratio(point, others[point.bits]) if point.bits in others else None

    return _kinds_figure(
        part,
        view.widths,
        style.dtype_colors(names),
        base,
        kind=lambda point: point.dtype,
        ratio=ratio,
        label=style.shown,
        bits="bits per weight",
        relative=f"KL relative to {style.shown(base)} of the same width",
    )


def block_figure(view: View) -> Figure | None:
    """Block sizes at equal bits per weight: whether small blocks are worth what their scales cost.

    Of the best data type, and the method with most points; None where these have a single block size.
    """
    dtype = best_dtype(view)
    method = most_common(point.method for point in view.quantized)
    part = view.without(lambda point: point.dtype == dtype and point.method == method)
    blocks = sorted({point.block_size for point in _measurable(part.quantized)}, key=lambda block: block or math.inf)
    if len(blocks) < 2:
        return None
    base = blocks[-1]
    return _kinds_figure(
        part,
        view.widths,
        dict(zip(blocks, style.ordered_colors(len(blocks)), strict=True)),
        base,
        kind=lambda point: point.block_size,
        ratio=lambda point, others: kl_ratio_at_equal_bits(point, list(others.values())),
        label=block_label,
        bits="bits per weight, scales included",
        relative=f"KL relative to {block_label(base)}\nat equal bits per weight",
    )


def _kinds_figure(
    part: View,
    widths: Sequence[int],
    hues: dict[Kind, str],
    base: Kind,
    *,
    kind: Callable[[Point], Kind],
    ratio: Callable[[Point, dict[int, Point]], Ratio | None],
    label: Callable[[Kind], str],
    bits: str,
    relative: str,
) -> Figure:
    """KL by bits per weight above, its ratio to that of a base below; a column per model, a line per kind of format.

    Args:
        part: the points to draw.
        widths: of the axis below.
        hues: the kinds in order, and their colours.
        base: the kind that the others are divided by.
        kind: of a point.
        ratio: of a point to what there is of the base, by width.
        label: a kind's name in the legend.
        bits, relative: titles of the axes.
    """
    shapes = dict(zip(hues, style.marks(len(hues)), strict=True))
    others = [name for name in hues if name != base]
    models = _columns(part)
    figure, grid = _two_rows(len(models))
    for column, model in enumerate(models):
        top, bottom = grid[0][column], grid[1][column]
        top.set_title(style.shown(model.label))
        rows = {name: _by_width([p for p in model.quantized if kind(p) == name]) for name in hues}
        for name, found in rows.items():
            _kl_line(top, _measurable(found.values()), hues[name], shapes[name], "")
            if name != base:
                ratios = {width: r for width, point in found.items() if (r := ratio(point, rows[base])) is not None}
                _ratio_marks(bottom, ratios, hues[name], shapes[name], _dodge(name, others))
        _ratio_panel(bottom, widths, hues[base])
        top.set_xlabel(bits)
    grid[0][0].set_ylabel(_KL)
    grid[1][0].set_ylabel(relative)
    _shared_log(grid[0], [p.kl for model in models for p in _measurable(model.quantized)])
    _ratio_axis(grid[1])
    _legend(figure, {label(name): (hues[name], shapes[name]) for name in hues})
    return figure


def error_figure(view: View) -> Figure:
    """KL against the weights' relative squared error, every format of every model."""
    figure = style.new_figure(7.2, 4.8)
    axes = figure.subplots()
    points = [point for point in _measurable(view.quantized) if point.weight_error > 0]
    names = sorted({point.dtype for point in points})
    shapes = dict(zip(names, style.marks(len(names)), strict=True))
    models = [model for model in view.models if model.quantized]
    for model, color in zip(models, style.ordered_colors(len(models)), strict=True):
        for point in model.quantized:
            if point.weight_error > 0 and point.kl >= KL_FLOOR:
                axes.plot(
                    point.weight_error, point.kl, shapes[point.dtype], color=color, alpha=0.85,
                    markeredgecolor="white", markeredgewidth=0.4, markersize=5.5,
                )  # fmt: skip
    errors = [point.weight_error for point in points]
    middle = sorted(points, key=lambda point: point.weight_error)[len(points) // 2]
    ends = [min(errors), max(errors)]
    axes.plot(
        ends, [middle.kl * end / middle.weight_error for end in ends], color=style.MUTED, linestyle=(0, (1, 2)),
        linewidth=1.2, zorder=1,
    )  # fmt: skip
    low, high = style.log_limits(errors)
    style.log_axis(axes.xaxis, style.plain, low=low, high=high)
    low, high = style.log_limits([point.kl for point in points])
    style.log_axis(axes.yaxis, style.plain, low=low, high=high)
    axes.set_xlabel("squared error of the weights, relative to their square")
    axes.set_ylabel(_KL)
    _two_legends(axes, models, shapes)
    return figure


def best_dtype(view: View) -> str:
    """The data type with the least mean ln KL over what all data types were measured at.

    Of the widths up to 5 bits, where data types matter, if any were measured; of types that share nothing, the one with
    most points.
    """
    low = view.without(lambda point: point.bits <= _LOW_BITS)
    view = low if _measurable(low.quantized) else view
    cells: dict[str, dict[tuple[object, ...], float]] = {}
    for model in view.models:
        for p in _measurable(model.quantized):
            cells.setdefault(p.dtype, {})[(model.label, p.bits, p.block_size, p.method)] = math.log(p.kl)
    common = set.intersection(*(set(found) for found in cells.values()))
    if not common:
        return max(cells, key=lambda name: len(cells[name]))
    return min(cells, key=lambda name: sum(cells[name][cell] for cell in common))


def _columns(view: View) -> list[Model]:
    """The models to show, at most MOST_COLUMNS, with the smallest and the largest among them."""
    models = [model for model in view.models if _measurable(model.quantized)]
    if len(models) <= MOST_COLUMNS:
        return models
    places = [round(index * (len(models) - 1) / (MOST_COLUMNS - 1)) for index in range(MOST_COLUMNS)]
    return [models[place] for place in places]


def _two_rows(columns: int) -> tuple[Figure, Any]:
    figure = style.new_figure(max(5.2, 0.6 + 3.0 * columns), 6.2)
    grid = figure.subplots(2, columns, sharey="row", squeeze=False, height_ratios=[1.2, 1.0])
    return figure, grid


def _kl_line(axes: Axes, points: Sequence[Point], color: str, mark: str, label: str) -> None:
    """KL against bits per weight with 95 % whiskers."""
    points = sorted(points, key=lambda point: point.bits_per_weight)
    x = [point.bits_per_weight for point in points]
    y = [point.kl for point in points]
    spans = [interval(draws) or (value, value) for draws, value in zip(kl_draws(points), y, strict=True)]
    below = [max(0.0, value - low) for value, (low, _) in zip(y, spans, strict=True)]
    above = [max(0.0, high - value) for value, (_, high) in zip(y, spans, strict=True)]
    axes.errorbar(
        x, y, yerr=[below, above], color=color, marker=mark, markeredgecolor="white", markeredgewidth=0.6,
        elinewidth=1.0, label=label or "_", zorder=3,
    )  # fmt: skip


def _ratio_panel(axes: Axes, widths: Sequence[int], color: str) -> None:
    """Widths below, and the line at which ratios are 1."""
    axes.axhline(1.0, color=color, linewidth=1.4, zorder=1)
    axes.set_xticks(widths)
    axes.set_xlim(min(widths) - 0.5, max(widths) + 0.5)
    axes.set_xlabel("bits")


def _ratio_marks(axes: Axes, ratios: dict[int, Ratio], color: str, mark: str, shift: float) -> None:
    """A mark with a whisker at each width; hollow where 1 lies inside the interval."""
    for width, ratio in ratios.items():
        low = ratio.value if ratio.low is None else min(ratio.low, ratio.value)
        high = ratio.value if ratio.high is None else max(ratio.high, ratio.value)
        axes.errorbar(
            width + shift, ratio.value, yerr=[[ratio.value - low], [high - ratio.value]], color=color, marker=mark,
            markerfacecolor=color if ratio.differs else "white", markeredgecolor=color, elinewidth=1.2, zorder=3,
        )  # fmt: skip


def _dodge(name: object, names: Sequence[object]) -> float:
    """Sideways places for marks of the same width."""
    reach = min(0.16 * (len(names) - 1), 0.6)
    return 0.0 if len(names) < 2 else reach * (list(names).index(name) / (len(names) - 1) - 0.5)


def _ratio_axis(row: Sequence[Axes]) -> None:
    """A logarithmic axis around 1, the same upwards and downwards, that holds everything drawn."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    ends = [abs(math.log(y)) for axes in row for y in axes.dataLim.intervaly if y > 0 and math.isfinite(y)]
    reach = min(max(*ends, math.log(1.12)), math.log(1000)) * 1.08
    ticks = next(ticks for most, ticks in _RATIO_TICKS if math.exp(reach) <= most)
    for axes in row:
        axes.set_yscale("log")
        axes.set_ylim(math.exp(-reach), math.exp(reach))
        axes.yaxis.set_major_locator(FixedLocator([*(1 / tick for tick in ticks), 1.0, *ticks]))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2g}x"))


def _shared_log(row: Sequence[Axes], values: list[float]) -> None:
    low, high = style.log_limits(values)
    style.log_axis(row[0].yaxis, style.plain, low=low, high=high)


def _legend(figure: Figure, entries: dict[str, tuple[str, str]]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=hue, marker=shape, markeredgecolor="white") for hue, shape in entries.values()]
    figure.legend(handles, list(entries), loc="outside lower center", ncols=min(8, len(entries)), columnspacing=1.4)


def _two_legends(axes: Axes, models: Sequence[Model], shapes: dict[str, str]) -> None:
    """Models by colour at the upper left, data types by mark at the lower right."""
    from matplotlib.lines import Line2D

    hues = style.ordered_colors(len(models))
    handles = [Line2D([], [], color=hue, marker="o", linestyle="") for hue in hues]
    first = axes.legend(handles, [style.shown(model.label) for model in models], loc="upper left", handletextpad=0.2)
    axes.add_artist(first)
    handles = [Line2D([], [], color=style.MUTED, marker=shape, linestyle="") for shape in shapes.values()]
    handles.append(Line2D([], [], color=style.MUTED, linestyle=(0, (1, 2)), linewidth=1.2))
    axes.legend(handles, [*map(style.shown, shapes), "in proportion"], loc="lower right", handletextpad=0.4)


def _by_width(points: Sequence[Point]) -> dict[int, Point]:
    """One point of each width, the one of least loss (a type may have several grids)."""
    found: dict[int, Point] = {}
    for point in sorted(points, key=lambda point: point.nll, reverse=True):
        found[point.bits] = point
    return dict(sorted(found.items()))


def _measurable(points: Any) -> list[Point]:
    return [point for point in points if point.kl >= KL_FLOOR]
