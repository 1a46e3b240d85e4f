"""What two runs of the benchmarks say about each other: ratios, their uncertainty, and which differences are real.

The estimator behind tools/compare_benchmarks.py. Ratios are of geometric means over the rounds, turned so that more
than 1 is better.

*Rounds.* The scatter of a row's logarithms is known badly from three or five rounds. Rows of one comparison scatter
alike, so each variance is drawn towards the common one as far as they agree with each other (the moderated t statistic:
Smyth, "Linear models and empirical Bayes methods for assessing differential expression", 2004, section 6).

*Drift.* Rounds of one run share the machine's state of that hour: a shared machine can be a tenth slower in the next
run with every round agreeing. What did not change between the runs shows by how much: rows of other engines of the same
version (llama.cpp, torch's products) and the memory's bandwidth, measured in the same rounds. The root mean square of
their differences, beyond what their own rounds explain, is the drift; without at least MIN_CONTROLS of them it comes
from several runs of a side, and without those it is assumed. A difference of mean logarithms has the variance of both
sides' rounds plus the drift's; Student's t with Satterthwaite's degrees of freedom gives interval and p-value.

*Accuracy* needs no clock: divergences on the same text are compared cluster by cluster, in pairs
(kbit.evaluate.statistics).

A difference is called real where Holm's procedure over all compared rows of kbit keeps the chance of any false one
below 1 - level.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, variance

from results import Row, Run, is_number, numbers, positive

LEVEL = 0.95
# Assumed difference between two runs where nothing in the files tells. Measured: peers of unchanged version, two runs
# two hours apart on a shared 2-core machine, 18 decoding rows: 7.6 % root mean square beyond their rounds.
DRIFT = 0.08
MIN_CONTROLS = 5
# No two runs are taken for closer: where code and environment lie in memory alone moves results by more (Mytkowicz et
# al., "Producing wrong data without doing anything obviously wrong!", 2009).
LEAST_DRIFT = 0.01
# Relative change of a divergence below which rounding of another instruction set is as good an explanation.
LEAST_ACCURACY = 0.001
# Rows from which a common scatter can be estimated, and the most degrees of freedom it may count for.
MIN_SCATTER, MOST_FREEDOM = 8, 100.0
# The variance of rounds that agree to every digit, which happens where a clock is coarse.
LEAST_VARIANCE = 1e-8
# Facts of a row that a clock has no part in: a change is worth a line.
FACTS = ("bits_per_weight", "linear_bits_per_weight", "bytes_per_token", "error")


@dataclass
class Difference:
    """One row before and after.

    Attributes:
        before, after: geometric means of the values; mean divergences for accuracy.
        change, low, high: how many times as good, and its interval; of accuracy the difference, after - before. None:
            nothing to estimate it from.
        better: whether the change is for the better, real or not.
        p: chance of so large a difference where there is none; None where that cannot be said.
        verdict: "better", "worse", "no real difference", "the same", or why nothing can be said.
        changed: facts of the row that changed beside its values, in words.
    """

    benchmark: str
    name: str
    unit: str
    before: float
    after: float
    change: float
    low: float | None = None
    high: float | None = None
    p: float | None = None
    verdict: str = "no real difference"
    better: bool = False
    changed: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Side:
    """One row in all runs of a side.

    Attributes:
        mean: of the logarithms.
        variance: of that mean, from rounds; None where there is one measurement only.
        freedom: degrees of freedom of `variance`.
    """

    mean: float
    variance: float | None
    freedom: float


@dataclass(frozen=True)
class Scatter:
    """What the rows have in common: a variance of logarithms, and how many degrees of freedom it counts for."""

    variance: float = 0.0
    freedom: float = 0.0

    def moderate(self, found: float, freedom: float) -> tuple[float, float]:
        """A row's own variance drawn towards the common one, and its degrees of freedom then."""
        both = self.freedom + freedom
        return (self.freedom * self.variance + freedom * max(found, LEAST_VARIANCE)) / both, both


def scatter_of(runs: Sequence[Run]) -> Scatter:
    """The common scatter, with as many degrees of freedom as the rows' variances agree with each other (Smyth 2004)."""
    from scipy.special import digamma, polygamma

    parts = []
    for run in runs:
        for row in run.rows.values():
            if len(row.values) > 1:
                logs = [math.log(value) for value in row.values]
                parts.append((math.log(max(variance(logs), LEAST_VARIANCE)), len(logs) - 1))
    if len(parts) < MIN_SCATTER:
        return Scatter()
    # log s^2 of d degrees of freedom has mean log sigma^2 + digamma(d/2) - log(d/2) and variance trigamma(d/2).
    shifted = [value - float(digamma(d / 2)) + math.log(d / 2) for value, d in parts]
    excess = variance(shifted) - fmean(float(polygamma(1, d / 2)) for _, d in parts)
    freedom = MOST_FREEDOM if excess <= 0 else min(2 * inverse_trigamma(excess), MOST_FREEDOM)
    return Scatter(math.exp(fmean(shifted) + float(digamma(freedom / 2)) - math.log(freedom / 2)), freedom)


def inverse_trigamma(value: float) -> float:
    """x with trigamma(x) = value, value > 0, by Newton's method on 1 / trigamma (Smyth 2004, appendix)."""
    from scipy.special import polygamma

    x = 0.5 + 1 / value
    for _ in range(50):
        at = float(polygamma(1, x))
        step = at * (1 - at / value) / float(polygamma(2, x))
        x += step
        if abs(step) < 1e-8 * x:
            break
    return x


def side_of(rows: Sequence[Row], scatter: Scatter) -> Side:
    """The row of every run of a side."""
    logs = [[math.log(value) for value in row.values] for row in rows]
    means = [fmean(values) for values in logs]
    if all(len(values) > 1 for values in logs):
        parts = []
        for values in logs:
            spread, freedom = scatter.moderate(variance(values), len(values) - 1)
            parts.append((spread / len(values) / len(logs) ** 2, freedom))
        return Side(fmean(means), sum(part for part, _ in parts), satterthwaite(parts))
    if len(logs) > 1:
        return Side(fmean(means), max(variance(means), LEAST_VARIANCE) / len(means), len(means) - 1)
    return Side(fmean(means), None, 0.0)


def satterthwaite(parts: Iterable[tuple[float, float]]) -> float:
    """Degrees of freedom of a sum of variances, each with its own."""
    parts = list(parts)
    divisor = sum(part**2 / freedom for part, freedom in parts if part > 0)
    return sum(part for part, _ in parts) ** 2 / divisor if divisor > 0 else math.inf


@dataclass(frozen=True)
class Drift:
    """How far two sides differ where nothing changed.

    Attributes:
        deviation: standard deviation of a logarithm.
        freedom: degrees of freedom of it.
        origin: where it comes from, for people.
    """

    deviation: float
    freedom: float
    origin: str


def drift_of(before: Sequence[Run], after: Sequence[Run], assumed: float, scatter: Scatter) -> Drift:
    """The drift between two sides, from the best source there is."""
    squares, noises = [], []
    for key in common_keys(before, after):
        rows = [run.rows[key] for run in (*before, *after)]
        if rows[0].engine == "kbit" or not all(row.values for row in rows) or changed_version(rows):
            continue
        one, other = side_of(rows[: len(before)], scatter), side_of(rows[len(before) :], scatter)
        if one.variance is not None and other.variance is not None:
            squares.append((other.mean - one.mean) ** 2)
            noises.append(one.variance + other.variance)
    if len(squares) >= MIN_CONTROLS:
        return drift_from(squares, noises, len(squares), f"{len(squares)} rows that did not change")
    squares, noises, runs = [], [], len(before) + len(after)
    share = 1 / len(before) + 1 / len(after)  # of a run's variance, in the difference of two means of runs
    for side in (before, after):
        for key in common_keys(side) if len(side) > 1 else ():
            logs = [[math.log(value) for value in run.rows[key].values] for run in side]
            if all(len(values) > 1 for values in logs):
                squares.append(share * variance([fmean(values) for values in logs]))
                noises.append(share * fmean(variance(values) / len(values) for values in logs))
    if squares:
        return drift_from(squares, noises, runs - 2, f"the spread of {runs} runs")
    return Drift(max(assumed, LEAST_DRIFT), math.inf, "an assumption (--drift): the files hold too little else")


def drift_from(squares: Sequence[float], noises: Sequence[float], freedom: float, origin: str) -> Drift:
    """The part of mean squares that rounds do not explain. The less that is of them, the less is known about it."""
    whole = fmean(squares)
    square = max(whole - fmean(noises), LEAST_DRIFT**2)
    return Drift(math.sqrt(square), freedom * (square / max(whole, square)) ** 2, origin)


def common_keys(*sides: Sequence[Run]) -> list[tuple[str, str]]:
    """Keys that all runs have, in the first one's order."""
    runs = [run for side in sides for run in side]
    return [key for key in runs[0].rows if all(key in run.rows for run in runs)]


def changed_version(rows: Sequence[Row]) -> bool:
    """Whether the version of what was measured differs between runs, as far as they say."""
    return len({str(row.about.get("version", row.about.get("backend"))) for row in rows}) > 1


def compare_speed(
    before: Sequence[Row], after: Sequence[Row], drift: Drift, scatter: Scatter, level: float
) -> Difference:
    """A row with values. Memory is not subject to the machine's pace."""
    from scipy.stats import t

    first = before[0]
    if first.unit.startswith("MB"):
        drift, scatter = Drift(LEAST_DRIFT, math.inf, ""), Scatter()
    one, other = side_of(before, scatter), side_of(after, scatter)
    sign = 1 if first.higher_is_better else -1
    gain = sign * (other.mean - one.mean)
    middles = math.exp(one.mean), math.exp(other.mean)
    found = Difference(first.benchmark, first.name, first.unit, *middles, math.exp(gain), better=gain > 0)
    if one.variance is None or other.variance is None:
        found.verdict = "measured once: cannot say"
        return found
    parts = [(one.variance, one.freedom), (other.variance, other.freedom), (drift.deviation**2, drift.freedom)]
    error, freedom = math.sqrt(sum(part for part, _ in parts)), satterthwaite(parts)
    reach = float(t.ppf(0.5 + level / 2, freedom)) * error
    found.low, found.high = math.exp(gain - reach), math.exp(gain + reach)
    found.p = float(2 * t.sf(abs(gain) / error, freedom))
    return found


def compare_accuracy(before: Row, after: Row, level: float) -> Difference:
    """A row of divergences, paired by cluster of text."""
    from scipy.stats import t

    was, now = float(before.about["kl_mean"]), float(after.about["kl_mean"])
    found = Difference(before.benchmark, before.name, "KL", was, now, now - was, better=now < was)
    if now == was:
        found.verdict = "the same"
        return found
    sizes, other_sizes = (positive(row.about.get("cluster_tokens")) for row in (before, after))
    ours, theirs = (numbers(row.about.get("cluster_kl")) for row in (before, after))
    same_text = all(before.about.get(key) == after.about.get(key) for key in ("model", "data_sha256"))
    if not same_text or sizes != other_sizes or len(sizes) < 2 or not len(ours) == len(theirs) == len(sizes):
        found.verdict = "not the same text: cannot say"
        return found
    if abs(now - was) < LEAST_ACCURACY * abs(was):
        found.verdict = "the same to rounding"
        return found
    gaps, count = [b - a for a, b in zip(ours, theirs, strict=True)], len(sizes)
    mean = sum(gaps) / sum(sizes)
    residuals = sum((gap - mean * size) ** 2 for gap, size in zip(gaps, sizes, strict=True))
    error = math.sqrt(count / (count - 1) * residuals) / sum(sizes)
    reach = float(t.ppf(0.5 + level / 2, count - 1)) * error
    found.low, found.high = mean - reach, mean + reach
    found.p = float(2 * t.sf(abs(mean) / error, count - 1)) if error else 0.0
    return found


def compare(
    before: Sequence[Run], after: Sequence[Run], drift: float = DRIFT, level: float = LEVEL
) -> tuple[Drift, list[Difference]]:
    """Every row of kbit that all runs have, judged; and the drift it was judged by (`drift`: the one to assume)."""
    scatter = scatter_of([*before, *after])
    shown = drift_of(before, after, drift, scatter)
    found = []
    for key in common_keys(before, after):
        ours, theirs = [run.rows[key] for run in before], [run.rows[key] for run in after]
        if ours[0].engine != "kbit":
            continue
        rows = (*ours, *theirs)
        if all(row.values for row in rows):
            found.append(compare_speed(ours, theirs, shown, scatter, level))
        elif all(is_number(row.about.get("kl_mean")) for row in rows):
            found.append(compare_accuracy(ours[-1], theirs[-1], level))
        else:
            continue
        found[-1].changed = changed_facts(ours[-1], theirs[-1])
    holm([one for one in found if one.p is not None], level)
    return shown, found


def holm(found: Sequence[Difference], level: float) -> None:
    """Calls differences real (Holm, "A simple sequentially rejective multiple test procedure", 1979)."""
    for place, one in enumerate(sorted(found, key=lambda one: one.p or 0.0)):
        if (one.p or 0.0) > (1 - level) / (len(found) - place):
            return
        one.verdict = "better" if one.better else "worse"


def changed_facts(before: Row, after: Row) -> list[str]:
    """What changed of a row beside its values."""
    lines = []
    for name in FACTS:
        was, now = before.about.get(name), after.about.get(name)
        if is_number(was) and is_number(now) and abs(now - was) > 1e-3 * abs(was):
            lines.append(f"{name.replace('_', ' ')} {was:.6g} -> {now:.6g}")
    return lines
