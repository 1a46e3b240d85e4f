"""Standard errors and intervals for means over tokens that are not independent.

Losses of neighbouring tokens are correlated (a hard sentence is hard for many tokens, a name seen once helps until
the window ends), so the textbook error of a mean over tokens is too small. The unit of sampling here is the cluster:
a window, whose tokens share their context. Windows share no context with each other, which leaves only the correlation
of a document that spans several windows; clusters are far larger than sentences, so little of it remains.

A spread estimated from few clusters is itself uncertain: from n of them by about 1/sqrt(2n - 2), which is 24 % at
ten and 71 % at two. MIN_CLUSTERS is a compromise: with fewer windows, every window is cut into equal blocks so that at
least that many clusters result, as long as a block keeps MIN_BLOCK tokens. Blocks of one window share their context,
so errors from them may come out too small; the number of clusters is reported along with every error.

Method: linearised ratio estimator for clusters, and the cluster bootstrap with percentile intervals (Efron and
Tibshirani, "An Introduction to the Bootstrap", chapters 8 and 13).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MIN_CLUSTERS = 10
MIN_BLOCK = 32
DRAWS = 2000
SEED = 20240229


@dataclass(frozen=True, eq=False)
class Clusters:
    """Per-token values summed by cluster.

    Attributes:
        sums: float64 (C,).
        sizes: float64 (C,), tokens in each cluster.
    """

    sums: NDArray[np.float64]
    sizes: NDArray[np.float64]

    @property
    def count(self) -> int:
        """C."""
        return len(self.sums)

    @property
    def mean(self) -> float:
        """Mean over tokens."""
        return float(self.sums.sum() / self.sizes.sum())


def cluster(values: NDArray[np.float64] | NDArray[np.bool_]) -> Clusters:
    """Clusters of per-token values (W windows, S tokens each): windows, or blocks of windows where W is small."""
    windows, tokens = values.shape
    blocks = 1
    if windows < MIN_CLUSTERS:
        blocks = max(1, min(-(-MIN_CLUSTERS // windows), tokens // MIN_BLOCK))
    edges = [(block * tokens) // blocks for block in range(blocks)]
    sums = np.add.reduceat(values.astype(np.float64), edges, axis=1)
    sizes = np.broadcast_to(np.diff([*edges, tokens]).astype(np.float64), sums.shape)
    return Clusters(sums.ravel(), sizes.ravel())


def standard_error(clusters: Clusters) -> float | None:
    """Standard error of the mean over tokens, or None for a single cluster.

    The spread of cluster totals around what the overall mean predicts for their size.
    """
    count = clusters.count
    if count < 2:
        return None
    residuals = clusters.sums - clusters.sizes * clusters.mean
    variance = count / (count - 1) * float(np.square(residuals).sum()) / float(clusters.sizes.sum()) ** 2
    return float(np.sqrt(variance))


def bootstrap_interval(
    clusters: Clusters, level: float = 0.95, draws: int = DRAWS, seed: int = SEED
) -> tuple[float, float] | None:
    """Percentile interval of the mean over tokens, clusters drawn with replacement; None for a single cluster.

    The draws depend on the seed and the number of clusters alone: models compared on the same windows are compared
    on the same draws. Percentile intervals cover somewhat less than their level while clusters are few (by theory
    about 0.90 instead of 0.95 at ten).
    """
    count = clusters.count
    if count < 2:
        return None
    generator = np.random.default_rng(seed)
    means = np.empty(draws)
    step = max(1, (1 << 20) // count)  # draws at a time: at most 8 MB of counts
    for start in range(0, draws, step):
        part = means[start : start + step]
        # How often each cluster occurs in each draw.
        times = generator.multinomial(count, np.full(count, 1.0 / count), size=len(part))
        part[:] = (times @ clusters.sums) / (times @ clusters.sizes)
    tail = 50.0 * (1.0 - level)
    low, high = np.percentile(means, [tail, 100.0 - tail])
    return float(low), float(high)
