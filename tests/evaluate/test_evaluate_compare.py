"""Comparison with a reference, on models whose divergences are known in closed form."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kbit.evaluate import logits as logits_module
from kbit.evaluate.compare import Comparison, compare, compare_many
from kbit.evaluate.logits import StoredLogits
from kbit.evaluate.perplexity import PerplexityResult, evaluate_perplexity
from kbit.host.errors import KbitError, UsageError
from kbit.text.windows import Windows, cut_windows

VOCAB = 29


class FakeSpec:
    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size


class BigramModel:
    """Logits are a row of a (V, V) float32 table chosen by the last token."""

    def __init__(self, table: NDArray[np.floating]) -> None:
        self.table = table.astype(np.float32)
        self.spec = FakeSpec(table.shape[1])
        self.fed = 0

    def new_cache(self, batch: int, capacity: int) -> None:
        return None

    def forward(
        self, ids: torch.Tensor, cache: None, lengths: torch.Tensor | None = None, last_only: bool = False
    ) -> torch.Tensor:
        self.fed += ids.shape[1]
        rows = torch.from_numpy(self.table)[ids]
        return rows[:, -1:] if last_only else rows


def _tables(noise: float = 0.3) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A reference's table and a disturbed copy of it."""
    generator = np.random.default_rng(5)
    reference = generator.normal(0.0, 2.0, (VOCAB, VOCAB))
    return reference, reference + generator.normal(0.0, noise, (VOCAB, VOCAB))


def _windows(count: int = 14, context: int = 20) -> Windows:
    ids = np.random.default_rng(6).integers(0, VOCAB, count * context).tolist()
    return cut_windows(ids, "gptq", context)


def _log_softmax(z: NDArray[np.floating]) -> NDArray[np.float64]:
    z = z.astype(np.float64)
    return np.asarray(z - np.log(np.exp(z).sum(axis=-1, keepdims=True)))


@pytest.fixture(params=[(512, 1 << 25, 1 << 22), (512, 6 * VOCAB, 4 * VOCAB), (1, 1, 1)])
def _piece_sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(("_PIECE_MAX", "_PIECE_ELEMENTS", "_ROW_ELEMENTS"), request.param, strict=True):
        monkeypatch.setattr(logits_module, name, value)


@pytest.mark.usefixtures("_piece_sizes")
def test_every_figure_equals_its_definition() -> None:
    """From float32 tables in float64: sums over the vocabulary keep KL to about V eps = 1e-14."""
    theirs, ours = _tables()
    model, reference, windows = BigramModel(ours), BigramModel(theirs), _windows()
    result = compare(model, reference, windows)

    log_p, log_q = _log_softmax(reference.table), _log_softmax(model.table)
    past, following = windows.ids[:, :-1], windows.ids[:, 1:]
    kl = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)[past]
    difference = (log_p - log_q)[past, following]
    same = (model.table.argmax(axis=1) == reference.table.argmax(axis=1))[past]

    np.testing.assert_allclose(result.kl, kl, rtol=1e-11, atol=1e-14)
    np.testing.assert_allclose(result.model.nll, -log_q[past, following], rtol=1e-13)
    np.testing.assert_allclose(result.reference.nll, -log_p[past, following], rtol=1e-13)
    np.testing.assert_array_equal(result.same_top, same)
    assert 0 < same.mean() < 1
    assert result.kl_mean == pytest.approx(kl.mean(), rel=1e-11)
    assert result.kl_max == pytest.approx(kl.max(), rel=1e-11)
    assert result.kl_percentile(99) == pytest.approx(np.percentile(kl, 99), rel=1e-11)
    assert result.top1_agreement == same.mean()
    assert result.delta_nll == pytest.approx(difference.mean(), rel=1e-10)
    for error, values in (
        (result.kl_stderr, kl),
        (result.top1_stderr, same.astype(float)),
        (result.delta_nll_stderr, difference),
    ):
        assert error == pytest.approx(values.mean(axis=1).std(ddof=1) / np.sqrt(windows.count), rel=1e-9)


def test_a_model_against_itself_differs_by_exactly_nothing() -> None:
    table = _tables()[0]
    result = compare(BigramModel(table), BigramModel(table), _windows())
    assert (result.kl == 0.0).all()
    assert result.top1_agreement == 1.0
    assert result.delta_nll == 0.0
    assert result.delta_nll_interval() == (0.0, 0.0)
    assert result.kl_stderr == 0.0


def test_logits_that_differ_by_a_constant_are_the_same_distribution() -> None:
    """A shift of 512 is exact in float32 for multiples of 2^-14, and cancels in float64 to 512 eps."""
    table = np.round(_tables()[0] * 1024) / 1024
    result = compare(BigramModel(table + 512.0), BigramModel(table), _windows())
    assert np.abs(result.kl).max() < 8 * 512 * 2.3e-16
    assert result.top1_agreement == 1.0


def test_tiny_divergences_are_resolved() -> None:
    """KL of a small disturbance e is half the variance of e under p; float32 arithmetic would lose it (1e-9)."""
    theirs = _tables()[0].astype(np.float32)
    ours = (theirs + np.random.default_rng(8).choice([-1, 1], theirs.shape) * 6.1e-5).astype(np.float32)
    windows = _windows()
    result = compare(BigramModel(ours), BigramModel(theirs), windows)
    disturbance = ours.astype(np.float64) - theirs
    p = np.exp(_log_softmax(theirs))
    variance = (p * disturbance**2).sum(axis=1) - (p * disturbance).sum(axis=1) ** 2
    expected = (0.5 * variance)[windows.ids[:, :-1]]
    # Third-order terms are 6e-5 of the second; rounding adds 1e-15 to values of 1e-9.
    np.testing.assert_allclose(result.kl, expected, rtol=1e-3, atol=1e-14)
    assert 1e-10 < result.kl_mean < 4e-9


def test_ties_count_as_agreement_when_both_prefer_the_first() -> None:
    """A model without preferences is compared by its lowest token id."""
    flat, first = np.zeros((VOCAB, VOCAB)), np.zeros((VOCAB, VOCAB))
    first[:, 0] = 1.0
    last = first[:, ::-1]
    assert compare(BigramModel(flat), BigramModel(first), _windows()).top1_agreement == 1.0
    assert compare(BigramModel(flat), BigramModel(last), _windows()).top1_agreement == 0.0


def test_vocabularies_of_different_size() -> None:
    small = BigramModel(np.zeros((VOCAB, VOCAB)))
    large = BigramModel(np.zeros((VOCAB, VOCAB + 3)))
    with pytest.raises(UsageError, match=f"vocabulary of {VOCAB + 3} tokens, the reference one of {VOCAB}"):
        compare(large, small, _windows())
    assert small.fed == large.fed == 0


@pytest.mark.parametrize(("broken", "what"), [(0, "the model's loss"), (1, "the reference's loss")])
def test_broken_logits_name_the_model(broken: int, what: str) -> None:
    tables = list(_tables())
    tables[broken][3] = np.nan
    with pytest.raises(KbitError, match=what):
        compare(BigramModel(tables[0]), BigramModel(tables[1]), _windows())


def test_a_token_the_model_rules_out_makes_an_infinite_divergence_an_error() -> None:
    theirs, ours = _tables()
    ours[:, VOCAB - 1] = -np.inf
    windows = cut_windows([1, 2, 3, 4, 5, 6], "gptq", 3)  # never predicts the token that is ruled out
    with pytest.raises(KbitError, match=r"the KL divergence is inf at token 1 of window 0"):
        compare(BigramModel(ours), BigramModel(theirs), windows)


def test_losses_are_those_of_a_plain_evaluation() -> None:
    theirs, ours = _tables()
    windows, seen = _windows(), []
    result = compare(BigramModel(ours), BigramModel(theirs), windows, lambda *event: seen.append(event))
    alone = evaluate_perplexity(BigramModel(ours), windows)
    np.testing.assert_allclose(result.model.nll, alone.nll, rtol=1e-15)
    assert seen[-1][:2] == (windows.count, windows.count)
    assert seen[-1][2] == pytest.approx(alone.mean_nll, rel=1e-14)


def test_the_interval_of_a_difference_covers_it() -> None:
    """Simulated pairs: windows share their difficulty (sd 1) in both models, and differ by 0.01 (sd 0.03) between them.

    The paired interval must cover 0.01 in about 94 % of 200 repetitions (scatter 1.7 points), and be far narrower
    than the losses' own errors, which is why comparisons are paired.
    """
    generator = np.random.default_rng(12)
    covered, widths = 0, []
    for _ in range(200):
        reference = generator.normal(3.0, 1.0, (40, 1)) + generator.normal(0.0, 1.0, (40, 30))
        model = reference + generator.normal(0.01, 0.03, (40, 1)) + generator.normal(0.0, 0.1, (40, 30))
        results = [PerplexityResult(nll, "gptq", 31) for nll in (model, reference)]
        paired = Comparison(*results, kl=np.zeros((40, 30)), same_top=np.ones((40, 30), dtype=bool))
        interval = paired.delta_nll_interval()
        assert interval is not None
        covered += interval[0] <= 0.01 <= interval[1]
        error = results[0].perplexity_stderr
        assert error is not None
        widths.append((interval[1] - interval[0]) / (3.92 * error / results[0].perplexity))
    assert 0.94 - 4 * 0.017 <= covered / 200 <= 1.0
    assert np.mean(widths) < 0.05


def test_many_candidates_run_the_reference_once() -> None:
    theirs, ours = _tables()
    reference, windows = BigramModel(theirs), _windows()
    loaded: list[float] = []

    def loader(noise: float) -> Callable[[], BigramModel]:
        def load() -> BigramModel:
            loaded.append(noise)
            return BigramModel(theirs + noise * (ours - theirs))

        return load

    noises = [0.0, 0.5, 1.0, 2.0]
    with StoredLogits(reference, windows) as stored:
        results = {}
        for name, result in compare_many(((str(noise), loader(noise)) for noise in noises), stored, windows):
            assert loaded[-1] == float(name)  # candidates are loaded one at a time
            results[name] = result
    assert reference.fed == windows.count * (windows.context - 1)
    assert results["0.0"].kl_mean == 0.0
    for noise in noises:
        direct = compare(loader(noise)(), BigramModel(theirs), windows)
        np.testing.assert_array_equal(results[str(noise)].kl, direct.kl)
    means = [results[str(noise)].kl_mean for noise in noises]
    assert means == sorted(means)
