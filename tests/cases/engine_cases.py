"""A batch engine over a tiny model, and what it answers, for tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from decoder_cases import TINY, DictSource, quantized, tame_tensors
from generation_cases import byte_tokenizer
from native_cases import native

from kbit.engine.answers import Done, Event, Failed, Finish, Piece, PromptScored, Request, TokenInfo, Usage
from kbit.engine.batch_engine import BatchEngine, Live
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

    @property
    def content(self) -> tuple[object, ...]:
        return self.texts, self.tokens, self.finishes, self.scored


def answer(engine: BatchEngine, request: Request, after_step: Callable[[], None] = lambda: None) -> Answer:
    """A request that is alone."""
    live, found = Live(request, engine.tokenizer), Answer.empty(request)
    engine.add(live)
    while len(engine):
        for each, events in engine.step():
            assert each is live
            found.take(events)
        after_step()
    return found


def check_pages(engine: BatchEngine) -> None:
    """Every page is free, kept for its contents, or used; and none is used where nobody is."""
    pool = engine.pool
    used = sum(pool.uses(page) > 0 for page in range(pool.count))
    assert used + pool.available == pool.count
    if not len(engine):
        assert used == 0
