"""Which pictures a set of points allows, with the words under each. The drawing is in plots_*.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kbit.scaling.report import plots_style as style
from kbit.scaling.report.plots_compare import (
    MOST_COLUMNS,
    best_dtype,
    bits_figure,
    block_figure,
    dtype_figure,
    error_figure,
)
from kbit.scaling.report.plots_data import KL_FLOOR, View, block_label, frontier, most_common
from kbit.scaling.report.plots_laws import best_width_figure, heldout_figure
from kbit.scaling.report.plots_scaling import AXES, block_title, frontier_figure, kl_figure, loss_figure, panel_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from kbit.scaling.laws.fit import SuiteLaws


@dataclass(frozen=True)
class Picture:
    """A figure and what a reader has to know to read it.

    Attributes:
        name: of its files, and of its place in the page.
        title: its heading.
        caption: one paragraph; may hold names from files, unescaped.
        figure: drawn.
    """

    name: str
    title: str
    caption: str
    figure: Figure


def draw_pictures(view: View, laws: SuiteLaws | None = None) -> Iterator[Picture]:
    """All pictures that the points of one text allow, the most important first. Each is drawn when it is asked for.

    Those that would show nothing (lines through one model, panels of one data type, ratios of nothing) are left out.
    """
    if not view.points:
        return
    for name, title, caption, wanted, draw in _pictures(view, laws):
        if wanted:
            with style.drawing():
                figure = draw()
            if figure is not None:
                yield Picture(name, title, caption, figure)


_Entry = tuple[str, str, str, bool, "Callable[[], Figure | None]"]


def _pictures(view: View, laws: SuiteLaws | None) -> Iterator[_Entry]:
    """(name, title, caption, whether there is something to see, how it is drawn)."""
    measurable = [point for point in view.quantized if point.kl >= KL_FLOOR]
    dtypes = {point.dtype for point in measurable}
    blocks = {point.block_size for point in measurable}
    methods = {point.method for point in measurable}
    joined = len(view.families[0]) > 1 and bool(view.quantized)
    best_of = _best_of(dtypes, blocks, methods)
    per_byte = (
        " Losses are per byte of text, since the tokenizers differ; lines join models that share one." * view.per_byte
    )
    yield (
        "loss", "Loss against size",
        f"One line per width through the sizes of the family; at each point {best_of}. At equal size, the lowest "
        f"line is the width to choose. Sizes count everything stored, scales included.{per_byte}",
        joined, lambda: loss_figure(view),
    )  # fmt: skip
    yield (
        "frontier", "The frontier",
        "Everything that was measured. The line is the frontier: the best loss to be had in at most so many bytes. "
        "Pale points are beaten by one that is no larger. Points of the frontier a hair apart may be tied: the "
        f"table below has their figures.{per_byte}",
        len(frontier(view, AXES["total"][1])) > 1, lambda: frontier_figure(view),
    )  # fmt: skip
    if laws is not None:
        yield (
            "best-width", "Which width is best",
            "The probability that a width gives the least loss for a size, from the measured points, interpolated "
            "between model sizes (linear in the logarithm of the size) on texts redrawn by cluster. Hatched: the "
            "contenders are not all measured there, so this is extrapolation.",
            True, lambda: best_width_figure(laws),
        )  # fmt: skip
    yield (
        "bits", "What a bit buys",
        f"KL divergence from the model's own original, {best_of}; whiskers are 95 % intervals over the clusters of "
        "text. The dotted line falls fourfold a bit, as the squared error of a finer grid does.",
        len({point.bits for point in measurable}) > 1, lambda: bits_figure(view),
    )  # fmt: skip
    yield (
        "kl", "KL divergence against size",
        f"The same by size, one line per width, {best_of}. Each model is compared with its own original, so a lower "
        "line here is not a better model: that is what the loss is for.",
        joined and bool(measurable), lambda: kl_figure(view),
    )  # fmt: skip
    yield (
        "by-data-type", "Loss against size, by data type",
        f"As the first picture, one panel per data type, {_best_of(set(), blocks, methods)}.",
        joined and len(dtypes) > 1, lambda: panel_figure(view, lambda point: point.dtype, str),
    )  # fmt: skip
    yield (
        "by-block-size", "Loss against size, by block size",
        f"As the first picture, one panel per block size, {_best_of(dtypes, set(), methods)}.",
        joined and len(blocks) > 1, lambda: panel_figure(view, lambda point: point.block_size, block_title),
    )  # fmt: skip
    yield (
        "by-method", "Loss against size, by method",
        f"As the first picture, one panel per method, {_best_of(dtypes, blocks, set())}.",
        joined and len(methods) > 1, lambda: panel_figure(view, lambda point: point.method, str),
    )  # fmt: skip
    some = " Some of the models, from the smallest to the largest." * (len(view.models) > MOST_COLUMNS)
    if len(dtypes) > 1:
        block = most_common(point.block_size for point in view.quantized)
        yield (
            "data-types", "Data types compared",
            f"At equal width, {block_label(int(str(block)))}. Below: KL relative to the base type on the same "
            "text, with 95 % intervals; below 1 is better, hollow marks are level with it (1 lies inside the "
            "interval)." + some,
            True, lambda: dtype_figure(view),
        )  # fmt: skip
    if len(blocks) > 1:
        yield (
            "block-sizes", "Block sizes compared",
            f"Data type {best_dtype(view)}. Above, bits per weight include the scales, so that curves compare "
            "as they stand: the lower one is the better use of bits. Below: KL relative to what the largest "
            "blocks reach at equal bits per weight (interpolated between widths); below 1, smaller blocks "
            "are worth their scales." + some,
            True, lambda: block_figure(view),
        )  # fmt: skip
    yield (
        "weight-error", "Weight error predicts the damage",
        "Every format of every model: the relative squared error of the weights, known without running the model, "
        "against the KL divergence measured. Dotted: in proportion.",
        sum(point.weight_error > 0 for point in measurable) > 3, lambda: error_figure(view),
    )  # fmt: skip
    if laws is not None:
        yield (
            "held-out", "How well the laws predict",
            "Each law is fitted without some of the points and then predicts their loss. Dashed: an error of 2 %. "
            "\"Nothing\" predicts that quantizing costs nothing: a law has to beat that.",
            True, lambda: heldout_figure(laws),
        )  # fmt: skip


def _best_of(dtypes: set[str], blocks: set[int], methods: set[str]) -> str:
    """Over what the best was taken, in words."""
    many = [
        name for name, found in (("data type", dtypes), ("block size", blocks), ("method", methods)) if len(found) > 1
    ]
    if not many:
        return "all in one format"
    return "the best " + (many[0] if len(many) == 1 else f"{', '.join(many[:-1])} and {many[-1]}")
