"""Guesses in the batch engine change no token, whoever makes them, right or wrong, and whatever happens around them."""

from __future__ import annotations

from collections.abc import Sequence as Sequence_
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from adapter_cases import shapes_of, write_adapter
from engine_cases import Answer, answer, answers, check_pages, some_requests, tiny_decoder, tiny_engine
from generation_cases import byte_tokenizer
from native_cases import VOCABULARY
from nested_cases import write_nested
from numpy.typing import NDArray

from kbit.backends.cpu.backend import NativeBackend
from kbit.engine import batch_engine, batch_speculation
from kbit.engine.answers import Request
from kbit.engine.batch_engine import BatchEngine, Live
from kbit.engine.batch_speculation import Asked, NgramDrafts, SelfDrafts, TextDrafts, batch_drafter
from kbit.engine.loader import LoadedModel, load_model
from kbit.engine.sampler import SamplingParams
from kbit.graph.pages import PagePool
from kbit.host.errors import UsageError
from kbit.models.decoder import Decoder


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return tiny_decoder()


class Oracle:
    """Knows the texts that there will be, and is wrong at random places."""

    name = "oracle"

    def __init__(self, texts: list[list[int]], right: float) -> None:
        self._texts, self._right = texts, right
        self._rng = np.random.default_rng(9)
        self.learned = 0

    def draft(self, asked: Sequence_[Asked], pool: PagePool) -> list[list[int]]:
        found = []
        for each in asked:
            ids, most = each.sequence.ids, min(int(self._rng.integers(0, 7)), each.room)
            known = next((text for text in self._texts if text[: len(ids)] == ids), ids)
            found.append([
                token if self._rng.random() < self._right else int(self._rng.integers(VOCABULARY))
                for token in known[len(ids) : len(ids) + most]
            ])  # fmt: skip
        return found

    def learn(self, drafts: TextDrafts, guessed: int, held: int, logits: NDArray[np.float32]) -> None:
        assert 0 <= held <= guessed
        assert logits.shape == (held + 1, VOCABULARY)
        self.learned += held


def texts_of(decoder: Decoder, requests: list[Request]) -> tuple[list[Answer], list[list[int]]]:
    """What each is answered alone, and all of its texts."""
    answers, texts = [], []
    for request in requests:
        engine = tiny_engine(decoder)
        live, found = Live(request, engine.tokenizer), Answer.empty(request)
        engine.add(live)
        while len(engine):
            for _, events in engine.step():
                found.take(events)
        answers.append(found)
        texts += [[*request.prompt, *choice.ids] for choice in live.choices]
    return answers, texts


@pytest.mark.parametrize(
    ("seed", "pages", "most_rows", "right"), [(0, 200, 512, 0.9), (1, 200, 40, 0.5), (2, 9, 512, 0.8)]
)
def test_guesses_change_no_token(
    decoder: Decoder, seed: int, pages: int, most_rows: int, right: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Penalties, stops, choices, log-probabilities; random arrivals, budgets and cancels; many pages and few."""
    requests = some_requests(14, seed=11)
    alone, texts = texts_of(decoder, requests)
    monkeypatch.setattr(batch_engine, "MOST_WRITING", 64)
    rng, oracle = np.random.default_rng(seed), Oracle(texts, right)
    engine = tiny_engine(decoder, pages, drafter=oracle)
    engine._rows = lambda: int(rng.integers(1, most_rows + 1))  # type: ignore[method-assign]
    coming = rng.permutation(len(requests)).tolist() * 2
    owner: dict[Live, int] = {}
    found: dict[Live, Answer] = {}
    cancelled: set[Live] = set()
    while coming or len(engine):
        if coming and (not len(engine) or rng.random() < 0.1):
            index = int(coming.pop())
            live = Live(requests[index], engine.tokenizer)
            owner[live], found[live] = index, Answer.empty(requests[index])
            engine.add(live)
        for live, events in engine.step():
            found[live].take(events)
        check_pages(engine)
        running = [live for live in owner if engine.has(live)]
        if running and rng.random() < 0.005:
            cancelled.add(running[0])
            engine.cancel(running[0])
            check_pages(engine)
    for live, each in found.items():
        if live not in cancelled:
            assert each.content == alone[owner[live]].content
    done = engine.counters
    assert 0 < done.accepted_tokens == oracle.learned < done.drafted_tokens
    assert (engine.preemptions > 0) == (pages < 20)
    assert done.cached_tokens > 0
    if seed == 0:
        assert done.steps < 0.7 * (done.generated_tokens + len(found))


def test_nothing_is_guessed_under_load(decoder: Decoder) -> None:
    request = Request((5, 6, 7), SamplingParams(temperature=0.0), max_tokens=30, ignore_end=True)
    _, texts = texts_of(decoder, [request])
    for count in (4, 5):
        engine = tiny_engine(decoder, drafter=Oracle(texts, 1.0))
        for _ in range(count):
            engine.add(Live(request, engine.tokenizer))
        while len(engine):
            engine.step()
        assert (engine.counters.drafted_tokens > 0) == (count == 4)
        assert engine.counters.generated_tokens == 30 * count


def test_repeated_words_are_guessed(decoder: Decoder) -> None:
    """Prompt lookup over a text that goes round."""
    prompt = tuple(np.random.default_rng(1).integers(0, VOCABULARY, 20).tolist()) * 3
    for temperature in (0.0, 0.6):
        sampling = SamplingParams(
            temperature=temperature, seed=4, logit_bias=tuple((token, 6.0) for token in prompt[:6])
        )
        request = Request(prompt, sampling, max_tokens=120, ignore_end=True)
        engine = tiny_engine(decoder, drafter=NgramDrafts())
        assert answer(engine, request).content == answer(tiny_engine(decoder), request).content
        assert engine.counters.drafted_tokens > 0


@pytest.fixture(scope="module")
def nested(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """The tiny model at 2 to 6 bits in one file, with an adapter beside it."""
    folder = tmp_path_factory.mktemp("nested")
    out = write_nested(tiny_model, folder / "folder", "2..6", "--block-size", "16")
    lora = write_adapter(folder / "lora", tiny_model, shapes_of(tiny_model), size=0.2)
    return load_model(str(out), backend=NativeBackend(1), adapters={"lora": str(lora)})


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_low_planes_guess_for_all_texts_at_once(
    nested: LoadedModel, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_speculation, "PAUSE", 1)  # (Beside its embedding, the tiny model's planes save little.)

    def engine(pages: int, drafter: SelfDrafts | None) -> BatchEngine:
        return BatchEngine(nested.decoder, byte_tokenizer(), nested.decoder.new_pool(pages), drafter=drafter)

    rng = np.random.default_rng(2)
    most = nested.decoder.spec.max_positions
    requests = [
        Request(tuple(rng.integers(0, 100, length).tolist()), SamplingParams(temperature=temperature, seed=length),
                max_tokens=most - length, ignore_end=True, logprobs=1, adapter="lora" if length == 9 else None)
        for length in (3, 9, 20)
    ]  # fmt: skip
    alone = [answer(engine(40, None), request).content for request in requests]
    drafter = batch_drafter(nested, "self:5")
    assert isinstance(drafter, SelfDrafts)
    assert drafter.name == "self:5"
    together = engine(40, drafter)
    assert [each.content for each in answers(together, requests)] == alone
    assert together.counters.accepted_tokens > 0.3 * together.counters.drafted_tokens > 0
    # (Drafts and what others are told do not leave anything in the cache that a later text could find.)
    again = replace(requests[2], adapter=None)
    assert answer(together, again).content == alone[2]


def test_who_cannot_guess(nested: LoadedModel, tiny_model: Path) -> None:
    with pytest.raises(UsageError, match="--speculate gpt2: a server drafts with ngram, self or self:3"):
        batch_drafter(nested, "gpt2")
    with pytest.raises(UsageError, match="self:7: .* can draft at 2 to 5 bits"):
        batch_drafter(nested, "self:7")
    with pytest.raises(
        UsageError, match="has no width below the one it runs at; make a model of several with kbit quantize --nested"
    ):
        batch_drafter(load_model(str(tiny_model), backend=NativeBackend(1)), "self")
