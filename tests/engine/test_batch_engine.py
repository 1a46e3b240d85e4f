"""The batch engine: every request is answered as if it were alone, whatever happens around it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from engine_cases import Answer, Crowd, answer, answers, check_pages, some_requests, tiny_decoder, tiny_engine
from native_cases import VOCABULARY
from numpy.typing import NDArray

from kbit.engine.answers import Request
from kbit.engine.batch_engine import BatchEngine, Live
from kbit.engine.logprobs import token_infos
from kbit.engine.repetition import only_repeats
from kbit.engine.sampler import SamplingParams
from kbit.graph.pages import PAGE
from kbit.host.errors import KbitError, UsageError
from kbit.models.decoder import Decoder


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return tiny_decoder()


@pytest.fixture(scope="module")
def cases(decoder: Decoder) -> list[tuple[Request, Answer]]:
    return [(request, answer(tiny_engine(decoder), request)) for request in some_requests(24, seed=7)]


@pytest.mark.parametrize(
    ("seed", "pages", "seats", "most_rows"), [(0, 200, 64, 512), (1, 200, 3, 40), (2, 12, 64, 90), (3, 7, 64, 512)]
)
def test_the_same_request_gets_the_same_answer_under_load(
    decoder: Decoder, cases: list[tuple[Request, Answer]], seed: int, pages: int, seats: int, most_rows: int
) -> None:
    """Random arrivals, budgets and cancels; many pages and few; each request twice, the second time from the cache."""
    rng = np.random.default_rng(seed)
    engine = tiny_engine(decoder, pages, seats=seats)
    engine._rows = lambda: int(rng.integers(1, most_rows + 1))  # type: ignore[method-assign]
    coming = rng.permutation(2 * len(cases)).tolist()
    crowd = Crowd(engine)
    while coming or len(engine):
        for _ in range(int(rng.integers(0, 4))):
            if coming:
                index = int(coming.pop()) % len(cases)
                crowd.add(index, cases[index][0])
        crowd.step()
        running = crowd.running
        if running and rng.random() < 0.02:
            crowd.cancel(running[int(rng.integers(len(running)))])
    assert (engine.preemptions > 0) == (pages < 20)
    assert any(live.cached % PAGE for live in crowd.found), "no page was shared in part"
    assert 0 < len(crowd.cancelled) < len(cases)
    for live, each in crowd.found.items():
        alone = cases[crowd.number[live]][1]
        assert each.error is None
        if live in crowd.cancelled:
            assert all(whole.startswith(part) for whole, part in zip(alone.texts, each.texts, strict=True))
        else:
            assert each.content == alone.content
            assert each.usage is not None
            assert alone.usage is not None
            assert each.usage.completion_tokens == alone.usage.completion_tokens


def test_the_number_of_threads_changes_nothing(cases: list[tuple[Request, Answer]]) -> None:
    engine = tiny_engine(tiny_decoder(threads=2))
    for request, alone in cases[:8]:
        assert answer(engine, request).content == alone.content


def test_choices_differ_and_do_not_depend_on_their_number(decoder: Decoder) -> None:
    request = Request((5, 6, 7), SamplingParams(temperature=1.0, seed=3), max_tokens=20, choices=4)
    many = answer(tiny_engine(decoder), request)
    assert len(set(many.texts)) == 4
    for count in (1, 2):
        few = answer(tiny_engine(decoder), replace(request, choices=count))
        assert few.texts == many.texts[:count]


def test_pages_of_an_answer_serve_the_next_turn(decoder: Decoder) -> None:
    engine = tiny_engine(decoder)
    prompt = tuple(range(30))
    first = answer(engine, Request(prompt, max_tokens=70, ignore_end=True))
    turn = (*prompt, *first.ids(), 1, 2, 3)
    again = answer(engine, Request(turn, max_tokens=5))
    assert again.usage is not None
    assert again.usage.cached_tokens == 99  # all but the last token, which was not computed
    assert again.content == answer(tiny_engine(decoder), Request(turn, max_tokens=5)).content


def test_log_probabilities_are_those_of_the_raw_logits(decoder: Decoder) -> None:
    prompt = tuple(np.random.default_rng(0).integers(0, VOCABULARY, 90).tolist())
    sampling = SamplingParams(temperature=1.5, top_k=3, seed=1, repetition_penalty=1.3, logit_bias=((4, 5.0),))
    request = Request(prompt, sampling, max_tokens=8, logprobs=3, prompt_logprobs=2, ignore_end=True)
    found = answer(tiny_engine(decoder), request)
    ids = found.ids()
    logits = decoder.extend([*prompt, *ids], decoder.new_cache(1, 200), last_only=False).astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    assert found.scored[0].logprob is None
    assert [info.id for info in found.scored] == list(prompt)
    infos = [*found.scored[1:], *found.tokens[0]]
    assert [info.id for info in infos] == [*prompt[1:], *ids]
    for row, info in zip(expected, infos, strict=False):
        # A sum of V terms of float32, each rounded twice at most.
        assert info.logprob == pytest.approx(row[info.id], abs=4 * np.finfo(np.float32).eps * np.abs(row).max())
        assert [token for token, _ in info.top] == np.argsort(-row, kind="stable")[: len(info.top)].tolist()
    assert {len(info.top) for info in found.scored[1:]} == {2}


def test_ties_are_named_in_order() -> None:
    (info,) = token_infos(np.zeros((1, 10), np.float32), [0], [7], 4)
    assert [token for token, _ in info.top] == [0, 1, 2, 3]
    assert info.logprob == pytest.approx(-np.log(10))
    (info,) = token_infos(np.zeros((1, 10), np.float32), [0], [7], 40)
    assert len(info.top) == 10


def test_nothing_of_a_stop_string_is_shown(decoder: Decoder) -> None:
    """Wherever it is cut: a string that runs over several tokens, and tokens are named as far as their text is shown."""
    free = answer(tiny_engine(decoder), Request((1, 2), SamplingParams(temperature=1, seed=0), max_tokens=60))
    text = free.texts[0]
    for begin in (0, 7, 20):
        stop = text[begin : begin + 4]
        request = Request((1, 2), SamplingParams(temperature=1, seed=0), max_tokens=60, stop=(stop,), logprobs=0)
        found = answer(tiny_engine(decoder), request)
        assert found.texts[0] == text[: text.index(stop)]
        assert found.finishes == ["stop"]
        assert all(info.start < len(found.texts[0]) for info in found.tokens[0])
        assert not any(stop in piece.text for piece in found.pieces)


def test_a_long_prompt_does_not_stop_the_others(decoder: Decoder) -> None:
    """As many rows a pass as the time for a step allows at the speed of late; each answer gets its token in every one."""
    engine = tiny_engine(decoder, step_seconds=0.05)
    writing = [Live(Request((seed,), max_tokens=200, ignore_end=True), engine.tokenizer) for seed in range(3)]
    for live in writing:
        engine.add(live)
    engine.step()
    engine._pace.measure = lambda rows, seconds: None  # type: ignore[method-assign]
    engine._pace.rows_per_second, engine._pace.pass_seconds = 500.0, 0.01
    long = Live(Request(tuple(range(100)) * 5, max_tokens=1), engine.tokenizer)
    engine.add(long)
    steps = 0
    while engine.has(long):
        counts = {live: len(live.choices[0].ids) for live in writing}
        computed = engine.pool.count - engine.pool.available
        events = dict(engine.step())
        assert all(len(live.choices[0].ids) == count + 1 for live, count in counts.items())
        assert set(writing) <= events.keys()
        assert engine.pool.count - engine.pool.available <= computed + 1 + len(writing)
        steps += 1
    assert steps == -(-500 // (20 - len(writing)))


def test_prompts_are_read_however_many_write(decoder: Decoder) -> None:
    """On a machine so slow that those who write take all of a step's time."""
    engine = tiny_engine(decoder, pages=80, step_seconds=0.05)
    writing = [Live(Request((seed,), max_tokens=200, ignore_end=True), engine.tokenizer) for seed in range(30)]
    for live in writing:
        engine.add(live)
    engine._pace.measure = lambda rows, seconds: None  # type: ignore[method-assign]
    engine._pace.rows_per_second, engine._pace.pass_seconds = 1.0, 0.06
    while any(not live.choices[0].ids for live in writing):
        engine.step()
    new = Live(Request(tuple(range(60)), max_tokens=1), engine.tokenizer)
    engine.add(new)
    steps = 0
    while engine.has(new):
        engine.step()
        steps += 1
    assert steps == -(-60 // 16)


def test_limits_end_an_answer(decoder: Decoder) -> None:
    engine = tiny_engine(decoder, context=50)
    found = answer(engine, Request(tuple(range(40)), max_tokens=100, ignore_end=True))
    assert found.finishes == ["context"]
    assert found.usage is not None
    assert found.usage.completion_tokens == 10
    assert answer(engine, Request((1,), max_tokens=3, ignore_end=True)).finishes == ["length"]
    scored = answer(engine, Request((1, 2, 3), max_tokens=0, prompt_logprobs=0))
    assert len(scored.scored) == 3
    assert scored.texts == [""]
    assert scored.usage is not None
    assert scored.usage.completion_tokens == 0
    assert len(answer(engine, Request((1,), max_tokens=1, prompt_logprobs=0)).scored) == 1
    with pytest.raises(UsageError, match="the prompt has 50 tokens, which exceeds the available context size of 50"):
        engine.add(Live(Request((1,) * 50), engine.tokenizer))
    with pytest.raises(UsageError, match="outside the model's vocabulary"):
        engine.add(Live(Request((1, 100000)), engine.tokenizer))
    with pytest.raises(UsageError, match="the cache holds"):
        tiny_engine(decoder, 1, context=65)
    assert len(engine) == 0


def test_a_request_with_broken_logits_fails_alone(decoder: Decoder) -> None:
    class Broken:
        spec = decoder.spec
        fail = False

        def run(self, batch: object, cache: object) -> NDArray[np.float32]:
            if self.fail:
                raise KbitError("no memory")
            logits = np.array(decoder.run(batch, cache))  # type: ignore[arg-type]
            logits[np.array(batch.ids)[batch.wanted] == 77] = np.nan  # type: ignore[attr-defined]
            return logits

    broken = Broken()
    engine = BatchEngine(broken, tiny_engine(decoder).tokenizer, decoder.new_pool(20))
    good, bad = Request((1, 2), max_tokens=5), Request((3, 77), max_tokens=5, choices=3)
    answered, failed = answers(engine, (good, bad))
    assert answered.content == answer(tiny_engine(decoder), good).content
    assert "not finite" in str(failed.error)
    broken.fail = True
    assert str(answer(engine, good).error) == "no memory"
    check_pages(engine)
    broken.fail = False
    assert answer(engine, good).error is None


def test_a_constraint_is_obeyed(decoder: Decoder) -> None:
    class Odd:
        """Odd tokens, and four of them."""

        count = 0

        def mask(self) -> NDArray[np.bool_]:
            return np.arange(40) % 2 == 1

        def accept(self, token: int) -> None:
            self.count += 1

        @property
        def stopped(self) -> bool:
            return self.count == 4

    request = Request((1, 2), SamplingParams(temperature=2, seed=0), constraint=Odd, choices=2, logprobs=0)
    found = answer(tiny_engine(decoder), request)
    assert found.finishes == ["stop", "stop"]
    for tokens in found.tokens:
        assert [info.id % 2 for info in tokens] == [1] * 4
        assert all(info.id < 40 for info in tokens)


def test_what_only_repeats_is_seen() -> None:
    rng = np.random.default_rng(0)
    text = rng.integers(0, 50, 200).tolist()
    assert not only_repeats(text)
    assert only_repeats(text + [3] * 96)
    assert not only_repeats(text + [3] * 90)
    assert only_repeats(text + [1, 2, 3, 4, 5] * 20)
    assert only_repeats(text + text[:64] * 4)
    assert not only_repeats(text + text[:64] * 3)
    assert not only_repeats([1, 2] * 20)
