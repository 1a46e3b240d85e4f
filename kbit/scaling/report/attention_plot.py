"""A picture of which tokens attend to which: one cell a pair."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kbit.scaling.report import plots_style as style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Tokens are written at the sides up to so many; beyond, every so many-th.
_MOST_WRITTEN = 64
_LONGEST_TOKEN = 14


def attention_figure(tokens: Sequence[str], shares: NDArray[np.float32], title: str) -> Figure:
    """A map with a row for every token that attends and a column for every one that is attended to.

    Args:
        tokens: T texts.
        shares: (T, T).
        title: above it.
    """
    from matplotlib.colors import PowerNorm

    count = len(tokens)
    with style.drawing():
        size = min(12.0, max(4.0, 1.8 + 0.2 * min(count, _MOST_WRITTEN)))
        figure = style.new_figure(size + 0.6, size)
        axes = figure.subplots()
        # Shares are mostly small: the root tells small ones apart, and the scale beside says which is which.
        norm = PowerNorm(0.5, 0.0, max(float(shares.max()), 1e-6))
        image = axes.imshow(shares, cmap="YlGnBu", norm=norm, interpolation="nearest")
        step = -(-count // _MOST_WRITTEN)
        labels = [style.shown(repr(token)[1:-1] or "(empty)", _LONGEST_TOKEN) for token in tokens[::step]]
        axes.set_yticks(range(0, count, step), labels)
        axes.set_xticks(range(0, count, step), labels, rotation=90)
        axes.tick_params(length=0, labelsize=7)
        axes.grid(visible=False)
        axes.set_ylabel("token that attends")
        axes.set_xlabel("token attended to")
        for spine in axes.spines.values():
            spine.set_visible(False)
        bar = figure.colorbar(image, ax=axes, pad=0.02, fraction=0.04, aspect=24)
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=2, labelsize=7)
        axes.set_title(title)
    return figure
