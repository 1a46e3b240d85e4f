"""Paired comparisons of two models' answers: against scipy, against brute force, and by their coverage."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from kbit.evaluate.paired import compare_correct, holm, mcnemar_exact, paired_mean, tango_interval
from kbit.host.errors import KbitError

Z = NormalDist().inv_cdf(0.975)


@pytest.mark.parametrize(("lost", "gained"), [(0, 1), (3, 1), (10, 10), (40, 60), (400, 700), (2500, 2400)])
def test_mcnemar_is_the_exact_binomial_test(lost: int, gained: int) -> None:
    expected = scipy.stats.binomtest(lost, lost + gained, 0.5).pvalue
    assert mcnemar_exact(lost, gained) == pytest.approx(expected, rel=1e-9)
    assert mcnemar_exact(gained, lost) == mcnemar_exact(lost, gained)


def test_mcnemar_without_flips_shows_nothing() -> None:
    assert mcnemar_exact(0, 0) == 1.0


def score_statistic(difference: float, lost: int, gained: int, items: int) -> float:
    """Tango's statistic with the nuisance parameter found by maximising the likelihood numerically."""
    same = items - lost - gained

    def negative_likelihood(q: float) -> float:  # q: probability that an item is lost
        chances = (q, q + difference, 1 - 2 * q - difference)
        return -sum(n * math.log(max(p, 1e-300)) for n, p in zip((lost, gained, same), chances, strict=True))

    low, high = max(0.0, -difference), (1 - difference) / 2
    q = scipy.optimize.minimize_scalar(negative_likelihood, bounds=(low, high), options={"xatol": 1e-12}).x
    return float((gained - lost - items * difference) / math.sqrt(items * (2 * q + difference * (1 - difference))))


@pytest.mark.parametrize(("lost", "gained", "items"), [(2, 12, 50), (7, 3, 40), (5, 5, 100), (1, 20, 30)])
def test_tango_limits_are_where_the_score_reaches_the_quantile(lost: int, gained: int, items: int) -> None:
    low, high = tango_interval(lost, gained, items)
    assert low < (gained - lost) / items < high
    assert score_statistic(low, lost, gained, items) == pytest.approx(Z, abs=1e-4)
    assert score_statistic(high, lost, gained, items) == pytest.approx(-Z, abs=1e-4)


@given(st.integers(0, 30), st.integers(0, 30), st.integers(1, 200))
def test_tango_interval_mirrors_and_holds_the_estimate(lost: int, gained: int, more: int) -> None:
    items = lost + gained + more
    low, high = tango_interval(lost, gained, items)
    assert -1 <= low <= (gained - lost) / items <= high <= 1
    mirrored = tango_interval(gained, lost, items)
    assert mirrored == pytest.approx((-high, -low), abs=1e-9)


def test_no_flip_is_no_certainty() -> None:
    """Models that agree on all of 200 items may still differ by two points; a bootstrap alone would say 0 to 0."""
    right = np.arange(200) % 2 == 0
    result = compare_correct(right, right)
    assert (result.lost, result.gained, result.flips, result.p_value) == (0, 0, 0.0, 1.0)
    limit = Z**2 / (200 + Z**2)
    assert result.interval == pytest.approx((-limit, limit))


def test_intervals_cover_the_true_difference() -> None:
    """Of 400 draws at 60 items and 10 % against 5 % flips, some 380 intervals should hold the difference."""
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        kind = generator.choice(3, size=60, p=[0.05, 0.10, 0.85])
        theirs = np.where(kind == 2, generator.random(60) < 0.6, kind == 0)
        ours = np.where(kind == 2, theirs, kind == 1)
        interval = compare_correct(ours, theirs, draws=200).interval
        assert interval is not None
        held += interval[0] <= 0.05 <= interval[1]
    assert held >= 0.93 * 400  # 3 standard deviations below 95 % are 368


def test_counts_of_a_comparison() -> None:
    ours = [1, 1, 0, 0, 1, 1, 0, 1]
    theirs = [1, 0, 1, 1, 0, 0, 0, 1]
    result = compare_correct(ours, theirs)
    assert (result.items, result.gained, result.lost) == (8, 3, 2)
    assert result.difference == pytest.approx(result.accuracy - result.reference_accuracy)
    assert result.difference == pytest.approx(1 / 8)
    assert result.flips == pytest.approx(5 / 8)
    assert result.p_value == 1.0


def test_groups_are_drawn_together() -> None:
    """Every item twice, in one group with its copy, is no more evidence than every item once."""
    generator = np.random.default_rng(1)
    ours, theirs = generator.random((2, 300)) < 0.5
    once = compare_correct(ours, theirs)
    names = [f"item {index // 2}" for index in range(600)]
    twice = compare_correct(np.repeat(ours, 2), np.repeat(theirs, 2), names)
    alone = compare_correct(np.repeat(ours, 2), np.repeat(theirs, 2))
    assert twice.groups == once.groups == 300
    assert once.stderr is not None
    assert twice.stderr == pytest.approx(once.stderr)
    assert alone.stderr == pytest.approx(once.stderr / math.sqrt(2), rel=0.01)
    assert twice.interval is not None
    assert alone.interval is not None
    assert twice.interval[1] - twice.interval[0] > 1.3 * (alone.interval[1] - alone.interval[0])


def test_a_mean_of_differences() -> None:
    generator = np.random.default_rng(2)
    values = generator.normal(0.3, 1.0, 500)
    result = paired_mean(values)
    assert result.mean == pytest.approx(values.mean())
    assert result.stderr == pytest.approx(values.std(ddof=1) / math.sqrt(500), rel=1e-9)
    assert result.interval == pytest.approx(
        (result.mean - Z * values.std() / math.sqrt(500), result.mean + Z * values.std() / math.sqrt(500)), abs=0.02
    )


def test_one_item_has_no_error() -> None:
    result = compare_correct([1], [0])
    assert result.stderr is None
    assert result.interval is None
    assert result.difference == 1.0


def test_holm_steps_down() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_keeps_the_order_and_never_lowers(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    for p, a in zip(p_values, adjusted, strict=True):
        assert p <= a <= 1
        for other, b in zip(p_values, adjusted, strict=True):
            assert p > other or a <= b


@pytest.mark.parametrize(
    ("ours", "theirs", "groups"), [([], [], None), ([1], [1, 0], None), ([1, 0], [1, 0], ["one"]), ([[1]], [[1]], None)]
)
def test_answers_to_other_items_are_refused(ours: list[int], theirs: list[int], groups: list[str] | None) -> None:
    with pytest.raises(KbitError):
        compare_correct(ours, theirs, groups)


def test_nan_is_refused() -> None:
    with pytest.raises(KbitError, match="item 1"):
        paired_mean([0.0, math.nan])
