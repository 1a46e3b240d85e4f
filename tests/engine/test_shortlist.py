"""Drafts from a part of the vocabulary: which tokens are on the list, and that their logits are the model's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from engine_cases import answer, answers, tiny_engine
from nested_cases import write_nested
from numpy.typing import NDArray
from speculative_cases import both

from kbit.backends.cpu.backend import NativeBackend
from kbit.engine import batch_speculation, shortlist
from kbit.engine.answers import Request
from kbit.engine.batch_speculation import SelfDrafts, TextDrafts
from kbit.engine.loader import LoadedModel, load_model
from kbit.engine.sampler import SamplingParams
from kbit.engine.self_speculation import SelfDrafter
from kbit.engine.shortlist import ShortDecoder, Shortlist, can_shorten, top_probability
from kbit.engine.speculative import Speculation
from kbit.graph.batch import Batch

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lists of a vocabulary as small as tests have."""
    monkeypatch.setattr(shortlist, "_MANY", 4)
    monkeypatch.setattr(shortlist, "_LEAST", 6)


@pytest.fixture(scope="module")
def nested(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """The tiny model at 2 to 6 bits in one file."""
    out = tmp_path_factory.mktemp("short") / "folder"
    write_nested(tiny_model, out, "2..6", "--block-size", "16")
    return load_model(str(out), backend=NativeBackend(1))


def test_a_list_has_the_first_and_the_latest(small: None) -> None:
    found = Shortlist(16 * 100 + 3)
    assert len(found.groups) == 20
    assert found.part == 20 / 101
    rng = np.random.default_rng(0)
    latest: list[int] = []
    for _ in range(200):
        tokens = rng.integers(0, 1603, 5).tolist()
        found.add(tokens)
        latest += [token // 16 for token in tokens if token // 16 >= 10]
        expected = list(dict.fromkeys(reversed(latest)))[:10]
        assert len(set(found.groups.tolist())) == 20
        assert set(range(10)) | set(expected) <= set(found.groups.tolist())
    logits = np.full((2, 1603), -np.inf, np.float32)
    logits[0, :5] = np.nan  # says nothing
    logits[1] = 0
    logits[1, 1602] = 9
    found.add_likely(logits)
    assert 100 in found.groups
    assert len(Shortlist(50).groups) == 4  # no more than there are


def test_logits_are_the_model_s(small: None, nested: LoadedModel) -> None:
    """Of what is on the list to the bit, while the list changes; nothing else is possible."""
    decoder = nested.at_width(3).decoder
    assert can_shorten(decoder)
    size = decoder.spec.vocab_size
    tokens = Shortlist(size)
    short = ShortDecoder(decoder, tokens)
    caches = [each.new_cache(1, 24) for each in (decoder, short)]
    rng = np.random.default_rng(1)
    for count in (3, 1, 1, 2, 1):
        ids = rng.integers(0, size, count).tolist()
        tokens.add(ids)
        on = np.isin(np.arange(size) // 16, tokens.groups)
        assert 0 < on.sum() < size
        full, some = (each.extend(ids, cache) for each, cache in zip((decoder, short), caches, strict=True))
        assert some.shape == (1, size)
        np.testing.assert_array_equal(some[:, on], full[:, on])
        assert np.isneginf(some[:, ~on]).all()
    batch = Batch.of([[5, 7]], caches[0].lengths, "all")
    full, some = (np.asarray(each.run(batch, cache)) for each, cache in zip((decoder, short), caches, strict=True))
    np.testing.assert_array_equal(some[:, on], full[:, on])
    assert some.shape == (2, size)


@pytest.mark.parametrize("params", [None, SamplingParams(temperature=0.8, seed=3)])
def test_the_text_is_that_of_the_full_width(small: None, nested: LoadedModel, params: SamplingParams | None) -> None:
    from kbit.engine.generate import generate

    def drafter() -> SelfDrafter:
        made = SelfDrafter(nested, 5)
        assert isinstance(made._widths[0].decoder, ShortDecoder)
        made._widths[0].cost = 0.1
        return made

    ids = [5, 9, 17, 40, 3]
    if params is None:
        _, sped = both(lambda: nested.decoder, nested.tokenizer, ids, Speculation(drafter()), max_tokens=40)
        assert sped.speculation is not None
        assert sped.speculation.accepted > 0
    else:
        texts = [
            generate(nested.decoder, nested.tokenizer, ids, params, max_tokens=40, speculation=Speculation(drafter()))
            for _ in range(2)
        ]
        assert len({each.run().ids for each in texts}) == 1
        assert all(each.result.speculation and each.result.speculation.drafted for each in texts)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_answers_at_once_are_those_without(
    small: None, nested: LoadedModel, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch engine's drafts, of low planes that choose from a list, and copied: the tokens of an engine without."""
    monkeypatch.setattr(batch_speculation, "PAUSE", 1)
    rng = np.random.default_rng(3)
    going_round = tuple(rng.integers(0, 100, 6).tolist()) * 3
    requests = [
        Request(
            prompt, SamplingParams(temperature=temperature, seed=4, logit_bias=bias), max_tokens=30, ignore_end=True
        )
        for prompt, bias in (((3, 8, 60), ()), (going_round, tuple((token, 6.0) for token in going_round[:6])))
    ]
    alone = [answer(tiny_engine(nested.decoder), request).content for request in requests]
    drafter = SelfDrafts(nested, 5)
    assert isinstance(drafter._widths[0].decoder, ShortDecoder)
    made: list[bool] = []
    learn = drafter.learn

    def learned(drafts: TextDrafts, guessed: int, held: int, logits: NDArray[np.float32]) -> None:
        assert drafts.made is not None
        made.append(drafts.made.width is None)
        learn(drafts, guessed, held, logits)

    drafter.learn = learned  # type: ignore[method-assign]
    engine = tiny_engine(nested.decoder, drafter=drafter)
    assert [each.content for each in answers(engine, requests)] == alone
    assert engine.counters.accepted_tokens > 0
    assert set(made) == {True, False}  # both kinds of drafts were made


def test_who_has_no_list(nested: LoadedModel) -> None:
    assert not can_shorten(nested.decoder)  # of a small vocabulary
    assert not isinstance(SelfDrafter(nested, 3)._widths[0].decoder, ShortDecoder)


def test_probability_of_the_likeliest() -> None:
    logits = np.random.default_rng(2).normal(0, 3, 1000).astype(np.float32)
    expected = np.exp(logits.astype(np.float64) - logits.max()).sum()
    assert top_probability(logits) == pytest.approx(1 / expected, rel=1e-5)
    assert np.isnan(top_probability(np.array([1.0, np.nan], np.float32)))
    logits[5:] = -np.inf
    assert 0 < top_probability(logits) <= 1
