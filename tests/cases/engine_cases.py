"""A batch engine over a tiny model, and what it answers, for tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
from decoder_cases import TINY, DictSource, quantized, tame_tensors
from generation_cases import byte_tokenizer
from native_cases import VOCABULARY, native

from kbit.engine.answers import Done, Event, Failed, Finish, Piece, PromptScored, Request, TokenInfo, Usage
from kbit.engine.batch_engine import BatchEngine, Live
from kbit.engine.sampler import SamplingParams
from kbit.models.decoder import Decoder


def tiny_decoder(threads: int = 1, **config: object) -> Decoder:
    settings = {**TINY, "head_dim": 16, "model_type": "mistral", "max_position_embeddings": 1024, **config}
    return native(DictSource(settings, quantized(tame_tensors(settings), "nf4-b32")), threads=threads, kv="fp16")


def tiny_engine(decoder: Decoder, pages: int = 60, **options: object) -> BatchEngine:
    return BatchEngine(decoder, byte_tokenizer(), decoder.new_pool(pages, 4), **options)  # type: ignore[arg-type]


@dataclass
class Answer:
    """What a request was answered, choice by choice."""

    texts: list[str]
    tokens: list[list[TokenInfo]]
    finishes: list[Finish | None]
    scored: tuple[TokenInfo, ...] = ()
    usage: Usage | None = None
    error: Exception | None = None
    pieces: list[Piece] = field(default_factory=list)

    @classmethod
    def empty(cls, request: Request) -> Answer:
        count = request.choices
        return cls([""] * count, [[] for _ in range(count)], [None] * count)

    def take(self, events: Iterable[Event]) -> None:
        for event in events:
            assert self.usage is None, "nothing comes after the end"
            assert self.error is None, "nothing comes after a failure"
            if isinstance(event, Piece):
                assert self.finishes[event.choice] is None
                self.texts[event.choice] += event.text
                self.tokens[event.choice] += event.tokens
                self.finishes[event.choice] = event.finish
                self.pieces.append(event)
            elif isinstance(event, PromptScored):
                assert not self.scored
                self.scored = event.tokens
            elif isinstance(event, Done):
                assert all(self.finishes)
                self.usage = event.usage
            elif isinstance(event, Failed):
                self.error = event.error

    def ids(self, choice: int = 0) -> list[int]:
        return [info.id for info in self.tokens[choice]]

    @property
    def content(self) -> tuple[object, ...]:
        return self.texts, self.tokens, self.finishes, self.scored


@dataclass(eq=False)
class Crowd:
    """Requests that are in one engine together.

    Attributes:
        number: what a test calls each of them.
        found: what each is answered.
        cancelled: those that were taken away.
    """

    engine: BatchEngine
    number: dict[Live, int] = field(default_factory=dict)
    found: dict[Live, Answer] = field(default_factory=dict)
    cancelled: set[Live] = field(default_factory=set)

    def add(self, number: int, request: Request) -> Live:
        live = Live(request, self.engine.tokenizer)
        self.number[live], self.found[live] = number, Answer.empty(request)
        self.engine.add(live)
        return live

    @property
    def running(self) -> list[Live]:
        return [live for live in self.number if self.engine.has(live)]

    def cancel(self, live: Live) -> None:
        self.engine.cancel(live)
        self.cancelled.add(live)
        check_pages(self.engine)

    def step(self) -> None:
        for live, events in self.engine.step():
            assert live not in self.cancelled
            self.found[live].take(events)
        check_pages(self.engine)


def answers(engine: BatchEngine, requests: Iterable[Request]) -> list[Answer]:
    """Requests that come at the same time."""
    crowd = Crowd(engine)
    for number, request in enumerate(requests):
        crowd.add(number, request)
    while len(engine):
        crowd.step()
    return list(crowd.found.values())


def answer(engine: BatchEngine, request: Request, after_step: Callable[[], None] = lambda: None) -> Answer:
    """A request that is alone."""
    crowd = Crowd(engine)
    live = crowd.add(0, request)
    while len(engine):
        crowd.step()
        after_step()
    return crowd.found[live]


def check_pages(engine: BatchEngine) -> None:
    """Every page is free, kept for its contents, or used; and none is used where nobody is."""
    pool = engine.pool
    used = sum(pool.uses(page) > 0 for page in range(pool.count))
    assert used + pool.available == pool.count
    if not len(engine):
        assert used == 0


def some_requests(count: int, seed: int) -> list[Request]:
    """Prompts of all lengths, some with a beginning in common, and every way to choose."""
    rng = np.random.default_rng(seed)
    common = rng.integers(0, VOCABULARY, 140).tolist()
    requests = []
    for index in range(count):
        prompt = rng.integers(0, VOCABULARY, int(rng.choice([1, 5, 64, 65, 130, 200]))).tolist()
        if index % 3 == 0:
            prompt = common[: int(rng.integers(1, 140))] + prompt[:20]
        sampling = SamplingParams(
            temperature=float(rng.choice([0.0, 0.7, 1.3])),
            top_k=int(rng.choice([0, 5])),
            top_p=float(rng.choice([1.0, 0.9])),
            min_p=float(rng.choice([0.0, 0.02])),
            repetition_penalty=float(rng.choice([1.0, 1.2])),
            frequency_penalty=float(rng.choice([0.0, 0.4])),
            seed=int(rng.integers(1 << 40)),
            logit_bias=((3, 2.5), (9, -100.0)) if index % 4 == 1 else (),
        )
        requests.append(
            Request(
                tuple(prompt),
                sampling,
                max_tokens=int(rng.choice([1, 10, 160])),
                choices=int(rng.choice([1, 1, 3])),
                stop=("5", "ab") if index % 5 == 0 else (),
                logprobs=[None, 0, 4][index % 3],
                prompt_logprobs=2 if index % 7 == 3 else None,
            )
        )
    return requests
