"""Whether two models that answered the same items differ, or only seem to.

Accuracies of two widths on a few hundred items have errors of several percent each, most of it the items' own
difficulty, which both models share. Everything here looks at the items where the two disagree:

- flips: items that one has right and the other wrong. Two models may flip many items and still have the same accuracy,
  so flips see a quantization that accuracy does not (Dutta et al. 2024, "Accuracy is Not All You Need").
- McNemar's test, exact: without a difference, an item that flips is as likely gained as lost, so the smaller of the two
  counts is binomial with p = 1/2 (McNemar 1947). It takes items for independent.
- an interval for the difference of accuracies, from a bootstrap over groups of items that belong together, and never
  narrower than Tango's score interval for paired proportions (Statistics in Medicine 17:891, 1998): with few flips a
  bootstrap claims too much, with none it claims certainty.
- Holm's correction where several tests are looked at together (Scandinavian Journal of Statistics 6:65, 1979).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kbit.evaluate.statistics import DRAWS, SEED, Clusters, bootstrap_interval, standard_error
from kbit.host.errors import KbitError

LEVEL = 0.95


@dataclass(frozen=True)
class PairedAccuracy:
    """Two models' right and wrong answers to the same items.

    Attributes:
        items: how many.
        accuracy, reference_accuracy: fractions answered rightly.
        lost: items that only the reference has right.
        gained: items that only the model has right.
        stderr: standard error of the difference, by groups of items; None for a single group.
        interval: of the difference, at LEVEL; None for a single group.
        groups: groups of items that were drawn together.
        p_value: of no difference, McNemar's exact test, two-sided.
    """

    items: int
    accuracy: float
    reference_accuracy: float
    lost: int
    gained: int
    stderr: float | None
    interval: tuple[float, float] | None
    groups: int
    p_value: float

    @property
    def difference(self) -> float:
        """The model's accuracy less the reference's."""
        return (self.gained - self.lost) / self.items

    @property
    def flips(self) -> float:
        """Fraction of items that one has right and the other wrong."""
        return (self.gained + self.lost) / self.items


@dataclass(frozen=True)
class PairedMean:
    """The mean of a difference per item, with its error.

    Attributes:
        mean: over items.
        stderr: by groups of items; None for a single group.
        interval: cluster bootstrap, at LEVEL; None for a single group.
        groups: groups of items that were drawn together.
    """

    mean: float
    stderr: float | None
    interval: tuple[float, float] | None
    groups: int


def compare_correct(
    model: ArrayLike,
    reference: ArrayLike,
    groups: Sequence[str] | None = None,
    *,
    draws: int = DRAWS,
    seed: int = SEED,
) -> PairedAccuracy:
    """Compare two models' answers to the same items.

    Args:
        model: whether the model has each item right, bool (N,) or 0 and 1.
        reference: the same for the reference, in the same order.
        groups: N names; items of one name belong together (the two sentences of a Winograd pair, say). None: every
            item is on its own.

    Raises:
        KbitError: no items, or not the same number for all.
    """
    ours, theirs = (np.asarray(values, dtype=np.float64) for values in (model, reference))
    _check(ours, theirs, groups)
    gained = int(((ours == 1) & (theirs == 0)).sum())
    lost = int(((ours == 0) & (theirs == 1)).sum())
    mean = paired_mean(ours - theirs, groups, draws=draws, seed=seed)
    interval = None
    if mean.interval is not None:
        low, high = tango_interval(lost, gained, len(ours))
        interval = (min(low, mean.interval[0]), max(high, mean.interval[1]))
    return PairedAccuracy(
        items=len(ours),
        accuracy=float(ours.mean()),
        reference_accuracy=float(theirs.mean()),
        lost=lost,
        gained=gained,
        stderr=mean.stderr,
        interval=interval,
        groups=mean.groups,
        p_value=mcnemar_exact(lost, gained),
    )


def paired_mean(
    differences: ArrayLike, groups: Sequence[str] | None = None, *, draws: int = DRAWS, seed: int = SEED
) -> PairedMean:
    """Mean of differences (N,) with an interval from a bootstrap over groups of items (see compare_correct).

    Raises:
        KbitError: no items, a number of groups that is not N, or a difference that is NaN or infinite.
    """
    values = np.asarray(differences, dtype=np.float64)
    _check(values, values, groups)
    if not np.isfinite(values).all():
        raise KbitError(f"item {int(np.flatnonzero(~np.isfinite(values))[0])}: the difference is not a finite number")
    clusters = _clusters(values, groups)
    return PairedMean(
        clusters.mean, standard_error(clusters), bootstrap_interval(clusters, LEVEL, draws, seed), clusters.count
    )


def mcnemar_exact(lost: int, gained: int) -> float:
    """Two-sided p-value of McNemar's exact test: that items are lost as easily as gained. 1 where none differs."""
    flips, fewer = lost + gained, min(lost, gained)
    tail, term = 0, 1  # whole numbers: term = binomial(flips, i)
    for i in range(fewer + 1):
        tail += term
        term = term * (flips - i) // (i + 1)
    return min(1.0, 2 * tail / (1 << flips))


def tango_interval(lost: int, gained: int, items: int, level: float = LEVEL) -> tuple[float, float]:
    """Score interval of (gained - lost) / items for paired proportions.

    The differences d at which the score statistic, with the nuisance parameter at its likeliest value given d, reaches
    the normal quantile (Tango 1998, equations 7 to 9).
    """
    quantile = NormalDist().inv_cdf(0.5 + level / 2)
    estimate = (gained - lost) / items

    def score(d: float) -> float:
        linear = (2 * items - gained + lost) * d - gained - lost
        q = (math.sqrt(linear**2 + 8 * items * lost * d * (1 - d)) - linear) / (4 * items)
        variance = items * (2 * q + d * (1 - d))
        distance = items * (estimate - d)
        if variance <= 0:
            return 0.0 if distance == 0 else math.copysign(math.inf, distance)
        return distance / math.sqrt(variance)

    low = -1.0 if estimate == -1 else _bisect(lambda d: score(d) - quantile, -1.0, estimate)
    high = 1.0 if estimate == 1 else _bisect(lambda d: score(d) + quantile, estimate, 1.0)
    return low, high


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given: a test stands at level a where its adjusted p is at most a."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def _clusters(values: NDArray[np.float64], groups: Sequence[str] | None) -> Clusters:
    if groups is None:
        return Clusters(values, np.ones(len(values)))
    _, which = np.unique(np.array(groups), return_inverse=True)
    sums, sizes = np.bincount(which, weights=values), np.bincount(which)
    return Clusters(sums.astype(np.float64), sizes.astype(np.float64))


def _check(ours: NDArray[np.float64], theirs: NDArray[np.float64], groups: Sequence[str] | None) -> None:
    if not len(ours):
        raise KbitError("there is no item to compare on")
    if ours.shape != theirs.shape or ours.ndim != 1 or (groups is not None and len(groups) != len(ours)):
        names = "" if groups is None else f" with {len(groups)} groups"
        raise KbitError(f"{ours.shape} and {theirs.shape} answers{names} do not belong to the same items")


def _bisect(falling: Callable[[float], float], low: float, high: float) -> float:
    """Where a falling function crosses zero, to the last bits."""
    for _ in range(80):
        middle = (low + high) / 2
        if falling(middle) > 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2
