"""Redrawing the text: how losses, divergences and everything fitted to them would move on other text of this kind.

Clusters of text are drawn with replacement, the same draw for every point of a suite: what is hard in a draw is hard
for all formats alike, and differences keep the precision that pairing gives them (Efron and Tibshirani, "An
Introduction to the Bootstrap", chapter 8; the same draws as kbit.evaluate.statistics). Whatever is computed from a draw
- a slope, the best width - gets its uncertainty by being computed from every draw.

Text is not the only source of uncertainty. Which models were trained, and how well, is another; with a handful of
models it cannot be redrawn and is estimated from how far a model lies from what the others predict
(fitting.between_models).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kbit.evaluate.statistics import SEED
from kbit.scaling.points import Point

Array = NDArray[np.float64]

# The standard error of a 2.5 % percentile from 1000 draws is about 7 % of the interval's half width.
DRAWS = 1000
LEVEL = 0.95
# Redrawing models means little while there are few: of five, most draws have three different ones or fewer.
MIN_MODELS_TO_REDRAW = 6
# A draw with fewer different models than this is drawn again: three coefficients (1, ln N, ln D), and one model over.
_DIFFERENT_MODELS = 4


@dataclass(frozen=True, eq=False)
class Draws:
    """What every draw of the text says of every point.

    Attributes:
        nll: (P, 1 + R) nats per token; column 0 is the text as it is, the others are draws.
        kl: (P, 1 + R) nats per token.
    """

    nll: Array
    kl: Array

    @property
    def count(self) -> int:
        """R."""
        return int(self.nll.shape[1]) - 1

    def only(self, rows: Sequence[int]) -> Draws:
        """The draws of some of the points, in the order asked for."""
        return Draws(self.nll[list(rows)], self.kl[list(rows)])


def redraw(points: Sequence[Point], draws: int = DRAWS, seed: int = SEED) -> Draws:
    """Redraw the text of points that share their clusters (a suite's)."""
    sizes = np.array(points[0].cluster_tokens)
    count = len(sizes)
    times = np.ones((1 + draws, count))
    times[1:] = np.random.default_rng(seed).multinomial(count, np.full(count, 1.0 / count), size=draws)
    tokens = times @ sizes  # (1 + R,)
    nll = np.array([point.cluster_nll for point in points]) @ times.T / tokens
    kl = np.array([point.cluster_kl for point in points]) @ times.T / tokens
    return Draws(nll, kl)


def redraw_models(models: int, draws: int, seed: int = SEED) -> Array | None:
    """How often each model counts: (M, 1 + R), column 0 all ones. None while models are too few to redraw."""
    if models < MIN_MODELS_TO_REDRAW:
        return None
    times = np.ones((models, 1 + draws))
    # Another stream than the text's, so that the two are independent.
    generator = np.random.default_rng([seed, models])
    again = np.arange(1, 1 + draws)
    while len(again):
        times[:, again] = generator.multinomial(models, np.full(models, 1.0 / models), size=len(again)).T
        again = again[(times[:, again] > 0).sum(axis=0) < _DIFFERENT_MODELS]
    return times


def times_of(times: Array | None, chosen: Sequence[int]) -> Array | None:
    """`times` of some of the models; all of them once where a draw has too few. None while too few are chosen."""
    if times is None or len(chosen) < MIN_MODELS_TO_REDRAW:
        return None
    own = times[list(chosen)]
    own[:, (own > 0).sum(axis=0) < _DIFFERENT_MODELS] = 1.0
    return own


def interval(values: Array, level: float = LEVEL) -> tuple[float, float]:
    """Percentile interval of draws (column 0, the text as it is, left out); infinite where a draw has no value."""
    drawn = values[1:]
    if len(drawn) == 0 or not np.isfinite(drawn).all():
        return -math.inf, math.inf
    tail = 50.0 * (1.0 - level)
    low, high = np.percentile(drawn, [tail, 100.0 - tail])
    return float(low), float(high)
