"""Where a model's bits go, and where its errors hurt: maps of layers by matrices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kbit.host.errors import KbitError, UsageError
from kbit.host.files import write_durably
from kbit.scaling.report import plots_style as style
from kbit.scaling.report.html_page import Cell, Page
from kbit.scaling.report.layers import LayerTable, MatrixRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = ("png", "svg", "html")
# Numbers are written into the cells up to this many layers; beyond, they would not be readable.
_MOST_WRITTEN = 12
# Error maps of so many formats; the table on the page has all.
_MOST_FORMATS = 3
# A scale of colours reaches at least so far from the median, as a factor.
_LEAST_SPREAD = 1.25
# Predicted KL from which on the quadratic is rough, in nats per token: it is within a tenth below, and 60 % too much at
# 0.4 (docs/measurements.md).
LARGE_KL = 0.1
# What sensitivity is quoted for: noise of this share of a matrix's energy, about the error of 4 bits.
_QUOTED_ERROR = 0.01


def check_picture_path(path: Path) -> str:
    """The kind of picture a file's name asks for: "png", "svg" or "html".

    Raises:
        UsageError: another ending.
    """
    kind = path.suffix.lower().removeprefix(".")
    if kind not in KINDS:
        raise UsageError(f"--plot {path}: the name has to end in .png, .svg or .html")
    return kind


def write_layer_picture(table: LayerTable, path: Path) -> Path:
    """Draw a model's matrices into a .png, .svg or .html file (the page has the table, too).

    Raises:
        UsageError: another ending.
        KbitError: the file cannot be written, or matplotlib is missing.
    """
    kind = check_picture_path(path)
    with style.drawing():
        figure = layer_figure(table)
    content = _page(table, style.rendered(figure, "svg")) if kind == "html" else style.rendered(figure, kind)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, content)
    except OSError as error:
        raise KbitError(f"{path} cannot be written: {error.strerror or error}") from error
    return path


def layer_figure(table: LayerTable) -> Figure:
    """One map under the other, layers from left to right: bits, errors, sensitivity, and what the errors cost."""
    maps = _maps(table)
    bars = _damage_format(table)
    layers, kinds = len(table.layers), len(table.kinds)
    width = min(16.0, max(7.5, 2.6 + 0.3 * layers * (1.8 if layers <= _MOST_WRITTEN else 1.0)))
    heights = [0.23 * kinds + 0.25] * len(maps) + ([1.5] if bars else [])
    figure = style.new_figure(width, sum(heights) + 0.34 * len(heights) + 0.9)
    panels = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for panel, (title, values, colors, logarithmic, text) in zip(panels, maps, strict=False):
        _map(panel, table, values, colors, logarithmic, text)
        panel.set_title(title)
    if bars:
        _damage_bars(panels[-1], table, bars)
    panels[-1].set_xlabel("layer")
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000) if layers / step <= 24)
    panels[-1].set_xticks(range(0, layers, step), [str(layer) for layer in table.layers[::step]])
    figure.suptitle(style.shown(table.model, 60), x=0.012, ha="left", fontsize=12, fontweight="bold", color=style.INK)
    return figure


_Map = tuple[str, "NDArray[np.float64]", str, bool, "Callable[[float], str]"]


def _maps(table: LayerTable) -> list[_Map]:
    """(title, values (kinds, layers), colours, whether logarithmic, how a value is written) of each map."""
    found: list[_Map] = []
    stored = _grid(table, lambda row: row.bits_per_weight)
    known = stored[np.isfinite(stored)]
    if known.max() - known.min() > 1e-3:
        found.append(("Bits per weight, as stored", stored, "YlGnBu", False, lambda value: f"{value:.3g}"))
    for format in table.formats[:_MOST_FORMATS]:
        errors = 100 * np.sqrt(_grid(table, lambda row, format=format: row.errors.get(format)))  # type: ignore[misc]
        if np.isfinite(errors).any():
            name = "as stored" if format == "stored" else f"of {format}"
            title = f"Error {name} (% of the weights' root mean square)"
            found.append((title, errors, "YlGnBu", False, lambda value: f"{value:.3g}"))
    hurt = _grid(table, lambda row: row.kl_per_error)
    if np.isfinite(hurt).any():
        share = f"{100 * _QUOTED_ERROR:g} %"
        title = f"Sensitivity: KL from noise of {share} of a matrix's energy (0.001 nats per token)"
        found.append((title, 1000 * _QUOTED_ERROR * hurt, "YlOrRd", True, lambda value: f"{value:.2g}"))
    if not found:
        found.append(("Bits per weight, as stored", stored, "YlGnBu", False, lambda value: f"{value:.3g}"))
    return found


def _damage_format(table: LayerTable) -> str | None:
    """The format whose damage is drawn by layer: the first of which errors and sensitivities are known."""
    return next((format for format in table.formats if any(row.damage(format) for row in table.rows)), None)


def _grid(table: LayerTable, value: Callable[[MatrixRow], float | None]) -> NDArray[np.float64]:
    """Values by kind and layer, (K, L); NaN where there is no such matrix or no value."""
    places = {layer: place for place, layer in enumerate(table.layers)}
    kinds = {kind: place for place, kind in enumerate(table.kinds)}
    grid = np.full((len(kinds), len(places)), np.nan)
    for row in table.rows:
        found = value(row)
        if found is not None:
            grid[kinds[row.kind], places[row.layer]] = found
    return grid


def _map(
    axes: Axes,
    table: LayerTable,
    values: NDArray[np.float64],
    colors: str,
    logarithmic: bool,
    text: Callable[[float], str],
) -> None:
    """A heat map with its scale, and the numbers in the cells where they fit."""
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    finite = values[np.isfinite(values) & ((values > 0) | (not logarithmic))]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    if finite.size:  # differences of a few percent are to look small
        middle = float(np.median(finite))
        low, high = min(low, middle / _LEAST_SPREAD), max(high, middle * _LEAST_SPREAD)
    if high <= low:
        high = low + 1.0
    norm = LogNorm(low, high) if logarithmic and low > 0 else Normalize(low, high)
    image = axes.imshow(
        np.ma.masked_invalid(values), aspect="auto", cmap=colors, norm=norm, interpolation="nearest",
        extent=(-0.5, values.shape[1] - 0.5, values.shape[0] - 0.5, -0.5),
    )  # fmt: skip
    axes.set_yticks(range(len(table.kinds)), [style.shown(kind.rsplit(".", 1)[-1], 18) for kind in table.kinds])
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.set_facecolor("#f0f1f3")
    for edge in np.arange(0.5, values.shape[0] - 1):
        axes.axhline(edge, color="white", linewidth=0.8)
    for edge in np.arange(0.5, values.shape[1] - 1):
        axes.axvline(edge, color="white", linewidth=0.8)
    for spine in axes.spines.values():
        spine.set_visible(False)
    bar = axes.figure.colorbar(image, ax=axes, pad=0.012, fraction=0.03, aspect=14)
    bar.outline.set_visible(False)
    ticks = FixedLocator(style.log_ticks(low, high, 5)) if isinstance(norm, LogNorm) else MaxNLocator(4)
    bar.ax.yaxis.set_major_locator(ticks)
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: style.plain(value)))
    bar.ax.tick_params(length=2, labelsize=7)
    if values.shape[1] <= _MOST_WRITTEN:
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                dark = float(norm(max(value, low))) > 0.55
                axes.text(
                    column, row, text(value), ha="center", va="center", fontsize=7,
                    color="white" if dark else style.INK,
                )  # fmt: skip


def _damage_bars(axes: Axes, table: LayerTable, format: str) -> None:
    """The predicted KL divergence of each layer, stacked by matrix."""
    damage = 1000 * np.nan_to_num(_grid(table, lambda row: row.damage(format)))
    bottom = np.zeros(damage.shape[1])
    for kind, color in enumerate(style.colors(len(table.kinds))):
        name = style.shown(table.kinds[kind].rsplit(".", 1)[-1], 18)
        axes.bar(range(damage.shape[1]), damage[kind], 0.78, bottom, color=color, label=name)
        bottom = bottom + damage[kind]
    total = table.total_damage(format)
    name = "the stored weights" if format == "stored" else format
    whole = "" if total is None else f"; {style.plain(float(f'{1000 * total:.3g}'))} in all"
    axes.set_title(f"Predicted KL from {name}, by layer (0.001 nats per token{whole})")
    axes.set_ylim(0, 1.08 * max(float(bottom.max()), 1e-12))
    axes.grid(visible=False, axis="x")
    handles, names = axes.get_legend_handles_labels()
    figure = axes.figure
    figure.legend(
        handles, names, loc="outside lower center", ncols=min(8, len(names)), handlelength=1.0, columnspacing=1.2
    )


def _page(table: LayerTable, svg: bytes) -> bytes:
    """The picture and the table as a page."""
    page = Page(
        table.model, f"{len(table.rows)} matrices in {len(table.layers)} layers; errors against {table.against}"
    )
    page.picture("Layers and matrices", _caption(table), style.inline_svg(svg, "layers"))
    page.heading("All matrices")
    heads = ["matrix", "#layer", "#rows", "#columns", "stored as", "#bits per weight"]
    for format in table.formats:
        heads += [f"#error, {format}", f"#predicted KL, {format}"]
    if table.text is not None:
        heads += ["#KL per unit of error", "#standard error"]
    page.table(heads, [_cells(table, row) for row in table.rows], search=True)
    return page.html().encode("utf-8", "replace")


def _cells(table: LayerTable, row: MatrixRow) -> list[Cell]:
    cells: list[Cell] = [
        row.name, _exact(row.layer), _exact(row.shape[0]), _exact(row.shape[1]), row.stored_as,
        _rounded(row.bits_per_weight),
    ]  # fmt: skip
    for format in table.formats:
        cells += [_rounded(row.errors.get(format)), _rounded(row.damage(format))]
    if table.text is not None:
        cells += [_rounded(row.kl_per_error), _rounded(row.kl_per_error_stderr)]
    return cells


def _caption(table: LayerTable) -> str:
    parts = ["Errors are squared differences relative to the squared weights; the maps show the root in percent."]
    if table.text is not None:
        parts.append(
            f"Sensitivity was measured on {table.text}: the second derivative of the KL divergence in the direction of "
            "noise in one matrix (generalised Gauss-Newton trace). Times the error, it predicts the KL divergence that "
            "a format causes, and the sum over matrices that of the whole model, while errors are small: from about "
            f"{LARGE_KL:g} nats per token on, the prediction is rough."
        )
    return " ".join(parts)


def _exact(value: int) -> tuple[str, float]:
    return f"{value:,}", value


def _rounded(value: Any) -> tuple[str, float] | None:
    return None if value is None else (f"{value:.4g}", float(value))
