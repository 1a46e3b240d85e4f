"""Standard errors and intervals against their formulas, and against the spread of simulated repetitions."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from kbit.evaluate.statistics import (
    MIN_BLOCK,
    MIN_CLUSTERS,
    Clusters,
    bootstrap_interval,
    cluster,
    standard_error,
)

WINDOWS, TOKENS, REPETITIONS = 40, 50, 400
# Losses = mean + effect of the window + noise of the token.
WINDOW_SD, TOKEN_SD, MEAN = 1.0, 2.0, 3.0
TRUE_ERROR = float(np.sqrt((WINDOW_SD**2 + TOKEN_SD**2 / TOKENS) / WINDOWS))


@pytest.fixture(scope="module")
def repetitions() -> NDArray[np.float64]:
    """Simulated losses (repetitions, windows, tokens)."""
    generator = np.random.default_rng(7)
    effects = generator.normal(MEAN, WINDOW_SD, (REPETITIONS, WINDOWS, 1))
    return np.asarray(effects + generator.normal(0.0, TOKEN_SD, (REPETITIONS, WINDOWS, TOKENS)))


def test_windows_are_clusters_when_there_are_enough() -> None:
    values = np.arange(MIN_CLUSTERS * 6, dtype=np.float64).reshape(MIN_CLUSTERS, 6)
    clusters = cluster(values)
    assert clusters.count == MIN_CLUSTERS
    np.testing.assert_array_equal(clusters.sums, values.sum(axis=1))
    np.testing.assert_array_equal(clusters.sizes, 6.0)
    assert clusters.mean == values.mean()


@pytest.mark.parametrize(
    ("windows", "tokens", "expected"),
    [
        (1, 2047, 10),
        (3, 511, 12),
        (9, 100, 18),
        (1, 5 * MIN_BLOCK, 5),
        (2, MIN_BLOCK - 1, 2),
        (1, 10, 1),
        (10, 2047, 10),
    ],
)
def test_few_windows_are_cut_into_blocks(windows: int, tokens: int, expected: int) -> None:
    values = np.random.default_rng(0).normal(size=(windows, tokens))
    clusters = cluster(values)
    assert clusters.count == expected
    assert clusters.sizes.sum() == values.size
    assert clusters.sizes.max() - clusters.sizes.min() <= 1
    assert clusters.sizes.min() >= min(MIN_BLOCK, tokens)
    # Blocks are contiguous: rebuild the first window's from the sizes.
    edges = np.concatenate(([0], np.cumsum(clusters.sizes[: expected // windows]))).astype(int)
    sums = [values[0, start:stop].sum() for start, stop in pairwise(edges)]
    np.testing.assert_allclose(clusters.sums[: expected // windows], sums, rtol=1e-12)


def test_equal_clusters_give_the_textbook_error_of_their_means() -> None:
    values = np.random.default_rng(1).normal(size=(25, 8))
    means = values.mean(axis=1)
    error = standard_error(cluster(values))
    assert error == pytest.approx(means.std(ddof=1) / np.sqrt(25), rel=1e-12)


def test_one_cluster_has_no_error() -> None:
    clusters = cluster(np.ones((1, 4)))
    assert standard_error(clusters) is None
    assert bootstrap_interval(clusters) is None


def test_the_clustered_error_is_right_on_average(repetitions: NDArray[np.float64]) -> None:
    """Its square is unbiased; averaged over R repetitions it scatters by sqrt(2 / (W - 1) / R) = 1.1 %."""
    squares = []
    for values in repetitions:
        error = standard_error(cluster(values))
        assert error is not None
        squares.append(error**2)
    scatter = np.sqrt(2.0 / (WINDOWS - 1) / REPETITIONS)
    assert np.mean(squares) == pytest.approx(TRUE_ERROR**2, rel=4 * scatter)
    # And it predicts how much the mean itself scatters between repetitions (sd of a sd: 1 / sqrt(2 R) = 3.5 %).
    means = repetitions.mean(axis=(1, 2))
    assert means.std(ddof=1) == pytest.approx(np.sqrt(np.mean(squares)), rel=4 / np.sqrt(2 * REPETITIONS))


def test_errors_over_tokens_would_be_too_small(repetitions: NDArray[np.float64]) -> None:
    """Why windows are the clusters: taken for independent, tokens promise an error 3.3 times too small here."""
    naive = np.mean([values.std(ddof=1) / np.sqrt(values.size) for values in repetitions])
    expected = np.sqrt((WINDOW_SD**2 + TOKEN_SD**2) / (WINDOWS * TOKENS))
    assert naive == pytest.approx(expected, rel=0.05)
    assert naive < TRUE_ERROR / 3


def test_bootstrap_intervals_cover_the_truth(repetitions: NDArray[np.float64]) -> None:
    """A percentile interval over 40 clusters covers about 94 %; of 400, the share scatters by 1.2 points."""
    covered = 0
    for values in repetitions:
        interval = bootstrap_interval(cluster(values))
        assert interval is not None
        covered += interval[0] <= MEAN <= interval[1]
    share = covered / REPETITIONS
    assert 0.94 - 4 * 0.012 <= share <= 0.94 + 4 * 0.012


def test_a_bootstrap_interval_has_the_width_of_the_error(repetitions: NDArray[np.float64]) -> None:
    """Half-width 1.96 errors, with the 1 - 1/W that a bootstrap variance lacks; 20,000 draws leave 1 % of noise."""
    clusters = cluster(repetitions[0])
    interval = bootstrap_interval(clusters, draws=20_000)
    error = standard_error(clusters)
    assert interval is not None
    assert error is not None
    expected = 2 * 1.96 * error * np.sqrt(1 - 1 / WINDOWS)
    assert interval[1] - interval[0] == pytest.approx(expected, rel=0.06)
    assert interval[0] < clusters.mean < interval[1]


def test_bootstrap_draws_are_repeatable_and_shared() -> None:
    """The same seed gives the same draws for other values: shifting all values shifts the interval exactly."""
    values = np.random.default_rng(3).normal(size=(30, 4))
    first, again = bootstrap_interval(cluster(values)), bootstrap_interval(cluster(values))
    shifted = bootstrap_interval(cluster(values + 10.0))
    other = bootstrap_interval(cluster(values), seed=1)
    assert first is not None
    assert shifted is not None
    assert first == again
    assert first != other
    np.testing.assert_allclose(np.subtract(shifted, first), 10.0, atol=1e-12)


def test_bootstrap_of_a_small_case_by_enumeration() -> None:
    """Two clusters: the mean is one of three values with probabilities 1/4, 1/2, 1/4, so the interval is the range."""
    clusters = Clusters(np.array([0.0, 6.0]), np.array([2.0, 1.0]))
    assert bootstrap_interval(clusters) == (0.0, 6.0)
    # The middle half of the draws is the sample itself: mean 6 / 3, with unequal sizes weighed as tokens.
    low, high = bootstrap_interval(clusters, level=0.4) or (0.0, 0.0)
    assert (low, high) == (2.0, 2.0)


def test_many_clusters_are_drawn_in_parts() -> None:
    values = np.random.default_rng(5).normal(size=(3000, 2))
    interval = bootstrap_interval(cluster(values), draws=1500)
    error = standard_error(cluster(values))
    assert interval is not None
    assert error is not None
    assert interval[1] - interval[0] == pytest.approx(3.92 * error, rel=0.15)


def test_flags_are_values_too() -> None:
    flags = np.random.default_rng(2).random((20, 30)) < 0.9
    error = standard_error(cluster(flags))
    assert error == pytest.approx(flags.mean(axis=1).std(ddof=1) / np.sqrt(20), rel=1e-12)
