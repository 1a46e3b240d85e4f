"""Text that a model writes by itself: its distribution, and what it depends on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import kbit.models.sampled_text as sampled_text
from kbit.backends.select import select_backend
from kbit.checkpoint.resolve import open_model
from kbit.host.errors import KbitError, UsageError
from kbit.models.decoder import Decoder
from kbit.models.load import load_decoder
from kbit.models.sampled_text import sample_sequences, start_tokens
from kbit.text.tokenizer import Tokenizer


def load(path: Path | str, threads: int = 1) -> Decoder:
    with open_model(str(path)) as source:
        return load_decoder(source, select_backend("cpu", threads=threads))


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> Decoder:
    return load(tiny_model)


def test_a_seed_means_the_same_text_whatever_runs_beside_it(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"count": 5, "length": 20, "seed": 3}
    expected = sample_sequences(load(tiny_model), (7, 9), **asked)
    assert expected.shape == (5, 20)
    assert expected.dtype == np.int64
    assert expected[:, 0].tolist() == [7, 9, 7, 9, 7]
    monkeypatch.setattr(sampled_text, "_BATCH", 2)
    other = load(tiny_model, threads=2)
    assert (sample_sequences(other, (7, 9), **asked) == expected).all()
    # Longer and later ones go on where these ended.
    assert (sample_sequences(other, (7, 9), count=2, length=30, seed=3, first=3)[:, :20] == expected[3:]).all()
    assert (sample_sequences(other, (7, 9), count=5, length=20, seed=4) != expected).any()


def test_tokens_follow_the_model(tiny: Decoder) -> None:
    """The second token of many texts, against the probabilities that the model itself gives."""
    count = 4000
    ids = sample_sequences(tiny, (5,), count=count, length=2, seed=0)
    logits = tiny.extend([5], tiny.new_cache(1, 4))[0].astype(np.float64)
    expected = np.exp(logits - logits.max())
    expected *= count / expected.sum()
    found = np.bincount(ids[:, 1], minlength=len(expected))
    chi_squared = ((found - expected) ** 2 / expected).sum()
    free = len(expected) - 1
    assert abs(chi_squared - free) < 5 * np.sqrt(2 * free)


def test_draws_are_exact_at_the_edges() -> None:
    """Tokens of no probability are never drawn, the first block misses nothing, and the last is reached."""
    logits = np.full((4, 600), -np.inf, dtype=np.float32)
    logits[:, [3, 255, 256, 599]] = 0.0
    drawn = sampled_text._draw(logits, np.array([0.0, 0.25, 0.5, 1 - 2**-53]))
    assert drawn.tolist() == [3, 255, 256, 599]


def test_without_a_beginning_any_token_begins(tiny: Decoder, tiny_model: Path) -> None:
    with open_model(str(tiny_model)) as source:
        assert start_tokens(Tokenizer.from_source(source)) == ()
    ids = sample_sequences(tiny, (), count=50, length=1, seed=0)
    assert len(np.unique(ids)) > 30
    assert ids.min() >= 0
    assert ids.max() < tiny.spec.vocab_size


def test_progress_and_what_is_refused(tiny: Decoder) -> None:
    seen: list[tuple[int, int]] = []
    sample_sequences(tiny, (1,), count=3, length=4, seed=0, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(3, 9), (6, 9), (9, 9)]
    for wrong in ({"count": 0, "length": 4}, {"count": 1, "length": 65}, {"count": 1, "length": 0}):
        with pytest.raises(UsageError, match="cannot sample"):
            sample_sequences(tiny, (1,), seed=0, **wrong)
    with pytest.raises(KbitError, match="not finite"):
        sampled_text._draw(np.array([[0.0, np.nan]], dtype=np.float32), np.array([0.5]))


def test_a_real_model_writes_its_own_kind_of_text(novels_folder: str) -> None:
    """The loss of sampled text is the model's entropy: near its loss on held-out text (3.45), far from chance (7.6)."""
    decoder = load(novels_folder, threads=2)
    with open_model(novels_folder) as source:
        starts = start_tokens(Tokenizer.from_source(source))
    assert starts == (0,)
    ids = sample_sequences(decoder, starts, count=16, length=128, seed=1)
    losses = []
    for row in ids:
        logits = decoder.extend(row[:-1].tolist(), decoder.new_cache(1, 128), last_only=False).astype(np.float64)
        losses.append(np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(127), row[1:]])
    assert 3.0 < np.mean(losses) < 4.0
