"""Perplexity of models whose losses are known in closed form."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kbit.evaluate import logits as logits_module
from kbit.evaluate.logits import ModelLogits, StoredLogits, pieces, row_step
from kbit.evaluate.perplexity import PerplexityResult, evaluate_perplexity, token_nll
from kbit.host.errors import KbitError, UsageError
from kbit.text.windows import Convention, Windows, cut_windows

VOCAB = 37


class FakeSpec:
    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size


class FakeCache:
    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.tokens: list[int] = []


class TableModel:
    """Logits = a row of a table chosen by the whole past (sum of its tokens and positions), so that any token that is
    lost, repeated, out of place or fed to a stale cache changes what follows."""

    def __init__(self, seed: int, vocab_size: int = VOCAB, rows: int = 101, scale: float = 3.0) -> None:
        self.spec = FakeSpec(vocab_size)
        self.table = np.random.default_rng(seed).normal(0.0, scale, (rows, vocab_size)).astype(np.float32)
        self.calls: list[tuple[int, bool]] = []

    def logits_at(self, past: list[int]) -> NDArray[np.float32]:
        """What follows `past`, float32 (V,)."""
        key = sum((position + 1) * (token + 1) for position, token in enumerate(past))
        return np.asarray(self.table[key % len(self.table)])

    def new_cache(self, batch: int, capacity: int) -> FakeCache:
        assert batch == 1
        return FakeCache(capacity)

    def forward(
        self, ids: torch.Tensor, cache: FakeCache, lengths: torch.Tensor | None = None, last_only: bool = False
    ) -> torch.Tensor:
        assert ids.shape[0] == 1
        assert ids.dtype == torch.int64
        self.calls.append((ids.shape[1], last_only))
        rows = []
        for token in ids[0].tolist():
            cache.tokens.append(token)
            rows.append(self.logits_at(cache.tokens))
        assert len(cache.tokens) <= cache.capacity
        stacked = torch.from_numpy(np.stack(rows))[None]
        return stacked[:, -1:] if last_only else stacked


def expected_nll(model: TableModel, windows: Windows) -> NDArray[np.float64]:
    """Losses (W, S) straight from the definition, in numpy float64."""
    losses = []
    for row in windows.ids.tolist():
        for position in range(windows.first_scored, len(row) - 1):
            z = model.logits_at(row[: position + 1]).astype(np.float64)
            losses.append(np.log(np.exp(z).sum()) - z[row[position + 1]])
    return np.array(losses).reshape(windows.count, -1)


def sample_windows(convention: Convention, context: int = 24, count: int = 12) -> Windows:
    ids = np.random.default_rng(11).integers(0, VOCAB, context * count + 5).tolist()
    return cut_windows(ids, convention, context, bos_id=0)


@pytest.fixture(params=[(512, 1 << 25, 1 << 22), (5, 1 << 25, 1 << 22), (512, 7 * VOCAB, 3 * VOCAB), (1, 1, 1)])
def _piece_sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real sizes (one piece per window here), and sizes that cut windows into several uneven pieces."""
    for name, value in zip(("_PIECE_MAX", "_PIECE_ELEMENTS", "_ROW_ELEMENTS"), request.param, strict=True):
        monkeypatch.setattr(logits_module, name, value)


@pytest.mark.usefixtures("_piece_sizes")
@pytest.mark.parametrize("convention", ["gptq", "llamacpp"])
def test_losses_equal_the_definition(convention: Convention) -> None:
    """The logits are float32 and exactly known; float64 arithmetic on them is good to a few eps = 2e-16."""
    model, windows = TableModel(0), sample_windows(convention)
    result = evaluate_perplexity(model, windows)
    expected = expected_nll(model, windows)
    np.testing.assert_allclose(result.nll, expected, rtol=1e-13)
    assert result.perplexity == pytest.approx(math.exp(expected.mean()), rel=1e-13)
    assert result.tokens == expected.size == windows.scored


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary() -> None:
    model = TableModel(0, scale=0.0)
    result = evaluate_perplexity(model, sample_windows("gptq"))
    assert result.perplexity == pytest.approx(VOCAB, rel=1e-14)
    assert result.perplexity_stderr == pytest.approx(0.0, abs=1e-13)


def test_only_needed_logits_are_asked_for() -> None:
    """The first half of a llama.cpp chunk runs for its last position only, and the last token is never fed."""
    model, windows = TableModel(0), sample_windows("llamacpp", context=24, count=2)
    evaluate_perplexity(model, windows)
    assert model.calls == [(12, True), (11, False)] * 2


def test_standard_errors_follow_their_formulas() -> None:
    nll = np.random.default_rng(0).gamma(2.0, 1.5, (16, 50))
    result = PerplexityResult(nll, "gptq", 51)
    means = nll.mean(axis=1)
    assert result.perplexity_stderr == pytest.approx(np.exp(nll.mean()) * means.std(ddof=1) / 4, rel=1e-12)
    # llama.cpp: sqrt((mean of squares - square of mean) / (count - 1)) * perplexity.
    spread = np.sqrt((np.square(nll).mean() - nll.mean() ** 2) / (nll.size - 1))
    assert result.perplexity_stderr_tokens == pytest.approx(np.exp(nll.mean()) * spread, rel=1e-10)
    assert result.clusters == 16


def test_the_delta_method_predicts_the_spread_of_perplexity() -> None:
    """Perplexity over 300 simulated texts scatters as the formula says (sd of a sd: 1 / sqrt(600) = 4 %)."""
    generator = np.random.default_rng(4)
    errors, values = [], []
    for _ in range(300):
        nll = generator.normal(3.0, 0.2, (30, 1)) + generator.normal(0.0, 1.0, (30, 40))
        result = PerplexityResult(nll, "gptq", 41)
        assert result.perplexity_stderr is not None
        errors.append(result.perplexity_stderr)
        values.append(result.perplexity)
    assert np.std(values, ddof=1) == pytest.approx(np.sqrt(np.mean(np.square(errors))), rel=4 / np.sqrt(600))


def test_a_single_token_has_no_error() -> None:
    result = PerplexityResult(np.array([[2.0]]), "gptq", 2)
    assert result.perplexity_stderr is None
    assert result.perplexity_stderr_tokens is None
    assert result.perplexity == math.exp(2.0)


def test_a_hopeless_model_has_an_infinite_perplexity() -> None:
    assert PerplexityResult(np.full((2, 3), 1e4), "gptq", 4).perplexity == math.inf


def test_log_softmax_does_not_overflow_and_keeps_small_losses() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [0.0, 30.0, 0.0]])
    nll = token_nll(logits, torch.tensor([1, 1]))
    assert nll.dtype == torch.float64
    # The second loss is log(1 + 2 e^-30) = 1.9e-13. float64 keeps it to eps * 30; float32 would say 0.
    np.testing.assert_allclose(nll.numpy(), [2e4, np.log1p(2 * np.exp(-30.0))], rtol=1e-15, atol=30 * 2.3e-16)


def test_progress_reports_the_running_mean() -> None:
    windows, seen = sample_windows("gptq"), []
    result = evaluate_perplexity(TableModel(0), windows, lambda *event: seen.append(event))
    assert [event[:2] for event in seen] == [(index + 1, windows.count) for index in range(windows.count)]
    assert seen[0][2] == pytest.approx(result.nll[0].mean(), rel=1e-14)
    assert seen[-1][2] == pytest.approx(result.mean_nll, rel=1e-14)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_broken_logits_are_located(value: float) -> None:
    model, windows = TableModel(0), sample_windows("gptq", context=6, count=3)
    row = windows.ids[1].tolist()
    key = sum((position + 1) * (token + 1) for position, token in enumerate(row[:3])) % len(model.table)
    model.table[key, row[3]] = value
    with pytest.raises(KbitError, match=r"the model's loss is .* at token 3 of window 1"):
        evaluate_perplexity(model, windows)


def test_tokens_outside_the_vocabulary() -> None:
    for culprit in (VOCAB, -1):
        windows = cut_windows([1, 2, culprit, 3], "gptq", 4)
        with pytest.raises(UsageError, match=f"token id {culprit} is outside the model's vocabulary of {VOCAB}"):
            evaluate_perplexity(TableModel(0), windows)


def test_logits_narrower_than_the_vocabulary() -> None:
    model = TableModel(0)
    model.spec = FakeSpec(VOCAB + 3)
    with pytest.raises(KbitError, match=f"logits of shape .* and a vocabulary of {VOCAB + 3}"):
        evaluate_perplexity(model, sample_windows("gptq"))


@pytest.mark.parametrize("vocab_size", [64, 49_152, 151_936, 1 << 26])
def test_pieces_cover_a_window_within_the_memory_they_may_take(vocab_size: int) -> None:
    windows = Windows("gptq", np.zeros((1, 2048), dtype=np.int64), 0, 2048)
    parts = pieces(windows, vocab_size)
    assert [start for start, _ in parts] == [0, *(stop for _, stop in parts[:-1])]
    assert parts[-1][1] == 2047
    largest = max(stop - start for start, stop in parts)
    assert largest == 1 or 4 * largest * vocab_size <= 128 << 20
    assert row_step(vocab_size) == 1 or 8 * row_step(vocab_size) * vocab_size <= 32 << 20


class TestStoredLogits:
    @pytest.mark.usefixtures("_piece_sizes")
    def test_stored_logits_are_the_computed_ones_and_cost_one_run(self) -> None:
        model, windows = TableModel(2), sample_windows("llamacpp")
        with StoredLogits(model, windows) as stored:
            for _ in range(2):
                for index in (3, 0, 3):
                    live = list(ModelLogits(TableModel(2)).window(windows, index))
                    kept = list(stored.window(windows, index))
                    assert len(live) == len(kept)
                    assert all(torch.equal(a, b) for a, b in zip(live, kept, strict=True))
            runs = sum(tokens for tokens, _ in model.calls)
        assert runs == 2 * (windows.context - 1)

    def test_a_pass_that_stops_halfway_stores_nothing_false(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(logits_module, "_PIECE_MAX", 4)
        model, windows = TableModel(2), sample_windows("gptq")
        with StoredLogits(model, windows) as stored:
            iterator = stored.window(windows, 1)
            next(iterator)
            del iterator
            got = torch.cat(list(stored.window(windows, 1)))
        assert torch.equal(got, torch.cat(list(ModelLogits(model).window(windows, 1))))

    def test_disk_is_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        windows = sample_windows("gptq")
        needed = 4 * VOCAB * windows.scored
        StoredLogits(TableModel(0), windows, max_bytes=needed).close()
        with pytest.raises(UsageError, match="use fewer tokens"):
            StoredLogits(TableModel(0), windows, max_bytes=needed - 1)

        class Full:
            free = needed - 1

        monkeypatch.setattr(logits_module.shutil, "disk_usage", lambda _: Full)
        with pytest.raises(KbitError, match="GB free"):
            StoredLogits(TableModel(0), windows)

    def test_nothing_is_left_on_disk(self, tmp_path: Path) -> None:
        folder = tmp_path
        windows = sample_windows("gptq")
        with StoredLogits(TableModel(0), windows, directory=folder) as stored:
            list(stored.window(windows, 0))
        assert list(folder.iterdir()) == []
        with pytest.raises(KbitError, match="cannot keep logits in"):
            StoredLogits(TableModel(0), windows, directory=folder / "missing")

    def test_other_windows_are_refused(self) -> None:
        with (
            StoredLogits(TableModel(0), sample_windows("gptq")) as stored,
            pytest.raises(ValueError, match="belong to the windows"),
        ):
            next(stored.window(sample_windows("gptq"), 0))
