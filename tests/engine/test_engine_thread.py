"""The engine's thread: requests from any thread, cancels within a step, a bounded queue, an orderly end."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from queue import SimpleQueue

import pytest
from engine_cases import Answer, answer, check_pages, tiny_decoder, tiny_engine

from kbit.engine.answers import Done, Event, Failed, Request
from kbit.engine.batch_engine import Live, TooLongError
from kbit.engine.engine_thread import EngineThread, QueueFullError, StoppedError
from kbit.engine.sampler import SamplingParams
from kbit.models.decoder import Decoder

PATIENCE = 60.0  # against hanging only


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return tiny_decoder()


class Reader:
    """What a thread delivered, for the test's thread to wait for."""

    def __init__(self) -> None:
        self.queue: SimpleQueue[tuple[Live, list[Event]]] = SimpleQueue()
        self.found: dict[Live, Answer] = {}

    def deliver(self, batch: list[tuple[Live, list[Event]]]) -> None:
        for each in batch:
            self.queue.put(each)

    def wait_for(self, live: Live) -> Answer:
        while live not in self.found or (self.found[live].usage is None and self.found[live].error is None):
            each, events = self.queue.get(timeout=PATIENCE)
            self.found.setdefault(each, Answer.empty(each.request)).take(events)
        return self.found[live]


@pytest.fixture
def reader() -> Reader:
    return Reader()


@pytest.fixture
def thread(reader: Reader) -> Iterator[EngineThread]:
    thread = EngineThread(reader.deliver, most_requests=3, most_tokens=300)
    thread.start()
    yield thread
    assert thread.stop(drain=False, timeout=PATIENCE)


def sampled(prompt: tuple[int, ...], tokens: int = 30, seed: int = 1) -> Request:
    return Request(prompt, SamplingParams(temperature=1.0, seed=seed), max_tokens=tokens)


def test_two_models_take_turns(decoder: Decoder, reader: Reader, thread: EngineThread) -> None:
    engines = [tiny_engine(decoder), tiny_engine(tiny_decoder(num_hidden_layers=2))]
    requests = [sampled((1, 2, 3), seed=seed) for seed in range(2)]
    alone = [answer(engine, request).content for engine in engines for request in requests]
    lives = [(engine, Live(request, engine.tokenizer)) for engine in engines for request in requests]
    for engine, live in lives[:3]:
        thread.submit(engine, live)
    reader.wait_for(lives[0][1])
    thread.submit(*lives[3])
    for (_, live), expected in zip(lives, alone, strict=True):
        assert reader.wait_for(live).content == expected
    assert thread.active == 0
    assert thread.stalled_seconds == 0


def test_the_queue_is_bounded(decoder: Decoder, reader: Reader) -> None:
    thread = EngineThread(reader.deliver, most_requests=3, most_tokens=300)  # not started: nothing begins
    engine = tiny_engine(decoder)
    lives = [Live(sampled((index,) * 100), engine.tokenizer) for index in range(4)]
    with pytest.raises(TooLongError):
        thread.submit(tiny_engine(decoder, context=90), lives[0])
    for live in lives[:3]:
        thread.submit(engine, live)
    assert thread.queued == 3
    with pytest.raises(QueueFullError, match="3 requests of 300 tokens wait already, of at most 3") as caught:
        thread.submit(engine, lives[3])
    assert 1 <= caught.value.retry_after <= 60
    thread.start()
    for live in lives[:3]:
        reader.wait_for(live)
    thread.submit(engine, lives[3])
    assert reader.wait_for(lives[3]).error is None
    assert thread.stop(timeout=PATIENCE)
    with pytest.raises(StoppedError, match="shutting down"):
        thread.submit(engine, lives[0])


def test_tokens_in_the_queue_are_bounded(decoder: Decoder, reader: Reader) -> None:
    thread = EngineThread(reader.deliver, most_requests=30, most_tokens=150)
    engine = tiny_engine(decoder)
    thread.submit(engine, Live(sampled((1,) * 200), engine.tokenizer))  # alone, any length may wait
    with pytest.raises(QueueFullError, match="1 requests of 200 tokens"):
        thread.submit(engine, Live(sampled((1,)), engine.tokenizer))


def test_a_cancel_is_felt_at_once_and_by_nobody_else(decoder: Decoder, reader: Reader, thread: EngineThread) -> None:
    """While queued, in the prompt, and while writing."""
    engine = tiny_engine(decoder, seats=2)
    others = [Live(sampled((7, seed), 300, seed), engine.tokenizer) for seed in range(2)]
    expected = answer(tiny_engine(decoder), others[0].request)
    for live in others:
        thread.submit(engine, live)
    queued = Live(sampled((9,) * 90, 500), engine.tokenizer)
    thread.submit(engine, queued)
    thread.cancel(queued)
    thread.cancel(others[1])
    thread.cancel(others[1])
    assert reader.wait_for(others[0]).content == expected.content
    assert queued not in reader.found
    late = Live(sampled((5,), 3), engine.tokenizer)
    thread.submit(engine, late)
    assert reader.wait_for(late).usage is not None
    assert reader.found.get(others[1], Answer.empty(others[1].request)).usage is None
    assert thread.active == 0
    check_pages(engine)


def test_a_mistake_of_ours_is_said_and_survived(
    decoder: Decoder, reader: Reader, thread: EngineThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tiny_engine(decoder)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_begin", lambda *given: 1 / 0)
        live = Live(sampled((1,)), engine.tokenizer)
        thread.submit(engine, live)
        assert isinstance(reader.wait_for(live).error, ZeroDivisionError)
    live = Live(sampled((1,)), engine.tokenizer)
    thread.submit(engine, live)
    assert reader.wait_for(live).error is None
    assert thread.alive


def test_it_drains_or_stops(decoder: Decoder) -> None:
    for drain in (True, False):
        seen: list[Event] = []
        first = threading.Event()

        def deliver(
            batch: list[tuple[Live, list[Event]]], seen: list[Event] = seen, first: threading.Event = first
        ) -> None:
            seen.extend(event for _, events in batch for event in events)
            first.set()

        thread = EngineThread(deliver)
        thread.start()
        engine = tiny_engine(decoder)
        thread.submit(engine, Live(sampled((1, 2), 900), engine.tokenizer))
        assert first.wait(PATIENCE)
        assert thread.stop(drain=drain, timeout=PATIENCE)
        assert any(isinstance(event, Done) for event in seen) == drain
        assert not any(isinstance(event, Failed) for event in seen)
