"""Requests of a Python program to the engine's thread, and their answers: for threads, and for coroutines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from queue import SimpleQueue
from typing import TYPE_CHECKING, TypeAlias

from kbit.api.results import Completion, Token
from kbit.engine.answers import Done, Event, Failed, Finish, Piece, PromptScored, Request, TokenInfo, Usage
from kbit.engine.batch_engine import BatchEngine, Live
from kbit.engine.engine_thread import EngineThread
from kbit.host.errors import UsageError
from kbit.text.token_text import token_text

if TYPE_CHECKING:
    from kbit.text.tokenizer import Tokenizer

Sink: TypeAlias = "Callable[[list[Event]], None]"

# Requests of one's own program wait as long as they must.
_ANY_NUMBER = 1 << 62


class Runner:
    """An engine on a thread of its own.

    Args:
        engine: which nobody else uses.
    """

    def __init__(self, engine: BatchEngine) -> None:
        self.engine = engine
        self._sinks: dict[Live, Sink] = {}
        self._thread = EngineThread(self._deliver, _ANY_NUMBER, _ANY_NUMBER)
        self._thread.start()
        self._stopped = False

    def submit(self, request: Request, sink: Sink) -> Live:
        """Queues a request.

        Args:
            request: what to generate.
            sink: called on the engine's thread with what is answered; it must return at once.

        Raises:
            UsageError: the request is none that the model can answer, or the model was closed.
        """
        if self._stopped:
            raise UsageError("this model was closed: load it again")
        live = Live(request, self.engine.tokenizer)
        self._sinks[live] = sink
        try:
            self._thread.submit(self.engine, live)
        except BaseException:
            del self._sinks[live]
            raise
        return live

    def leave(self, live: Live, *, over: bool) -> None:
        """Nobody waits for a request any more; one that is not over is cancelled."""
        self._sinks.pop(live, None)
        if not over:
            self._thread.cancel(live)

    def stop(self) -> None:
        """Ends the thread after the step under way; who still waits is told that the request was cancelled."""
        self._stopped = True
        self._thread.stop(drain=False)
        closed = UsageError("the model was closed before this was answered: close it when all is")
        for sink in list(self._sinks.values()):
            sink([Failed(closed)])

    def _deliver(self, batch: list[tuple[Live, list[Event]]]) -> None:
        for live, events in batch:
            sink = self._sinks.get(live)
            if sink is not None:
                sink(events)


class Collected:
    """An answer in the making.

    Args:
        request: to which.
        tokenizer: the model's.

    Attributes:
        over: it is complete.
        scored: log-probabilities of the prompt's tokens, where they were asked for.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer) -> None:
        assert request.sampling.seed is not None
        self._tokenizer = tokenizer
        self._seed = request.sampling.seed
        self._texts: list[str] = []
        self._tokens: list[TokenInfo] = []
        self._finish: Finish = "cancelled"
        self._usage: Usage | None = None
        self.over = False
        self.scored: tuple[TokenInfo, ...] = ()

    def take(self, event: Event) -> str:
        """One more event; the text that it adds.

        Raises:
            KbitError and its kinds: the request failed.
        """
        if isinstance(event, Failed):
            self.over = True
            raise event.error
        if isinstance(event, Done):
            self.over, self._usage = True, event.usage
        elif isinstance(event, PromptScored):
            self.scored = event.tokens
        elif isinstance(event, Piece):
            return self._piece(event)
        return ""

    def _piece(self, piece: Piece) -> str:
        self._texts.append(piece.text)
        self._tokens += piece.tokens
        self._finish = piece.finish or self._finish
        return piece.text

    def result(self, live: Live) -> Completion:
        """What there is of it."""
        usage = self._usage or live.usage
        return Completion(
            text="".join(self._texts),
            tokens=named_tokens(self._tokens, self._tokenizer),
            finish_reason=self._finish,
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=usage.cached_tokens,
            completion_tokens=usage.completion_tokens,
            seed=self._seed,
            first_token_seconds=usage.first_token_seconds,
            seconds=usage.seconds,
        )


def named_tokens(infos: list[TokenInfo] | tuple[TokenInfo, ...], tokenizer: Tokenizer) -> tuple[Token, ...]:
    """The engine's tokens with their texts."""

    def text(token: int) -> str:
        return token_text(tokenizer, token)

    return tuple(
        Token(info.id, text(info.id), info.logprob, tuple((token, text(token), value) for token, value in info.top))
        for info in infos
    )


class Stream(Iterator[str]):
    """An answer as it is written: iterate over it for pieces of text, then read `result`.

    The request is queued when this is made. Leaving it before its end (`close`, the end of a `with`, or the last
    reference) cancels the request within a step.

    Args:
        runner: who answers.
        request: what to generate; its seed is given.
    """

    def __init__(self, runner: Runner, request: Request) -> None:
        self._left = True
        self._events: SimpleQueue[list[Event]] = SimpleQueue()
        self._collected = Collected(request, runner.engine.tokenizer)
        self._pending: list[Event] = []
        self._runner = runner
        self._live = runner.submit(request, self._events.put)
        self._left = False

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> str:
        while not self._left and not self._collected.over:
            if not self._pending:
                self._pending = self._events.get()[::-1]
            try:
                text = self._collected.take(self._pending.pop())
            finally:
                self._close_if_over()
            if text:
                return text
        raise StopIteration

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def _close_if_over(self) -> None:
        if self._collected.over:
            self.close()

    def close(self) -> None:
        """Cancels the request, unless it is answered."""
        if not self._left:
            self._left = True
            self._runner.leave(self._live, over=self._collected.over)

    @property
    def result(self) -> Completion:
        """The answer; before its end, what there is so far ("cancelled")."""
        return self._collected.result(self._live)

    @property
    def scored(self) -> tuple[TokenInfo, ...]:
        """Log-probabilities of the prompt's tokens, where they were asked for."""
        return self._collected.scored

    def finish(self) -> Completion:
        """The whole answer, once it is there."""
        for _ in self:
            pass
        return self.result


class AsyncStream(AsyncIterator[str]):
    """`Stream` for coroutines: `async for` over it, then read `result`. The request is queued with the first piece that
    is waited for; whoever leaves early should `await` `aclose` (or use `async with`).

    Args:
        runner, request: see `Stream`.
    """

    def __init__(self, runner: Runner, request: Request) -> None:
        self._runner, self._request = runner, request
        self._collected = Collected(request, runner.engine.tokenizer)
        self._events: asyncio.Queue[list[Event]] = asyncio.Queue()
        self._pending: list[Event] = []
        self._live: Live | None = None
        self._left = False

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> str:
        if self._live is None and not self._left:
            self.start()
        while not self._left and not self._collected.over:
            try:
                if not self._pending:
                    self._pending = (await self._events.get())[::-1]
                text = self._collected.take(self._pending.pop())
            except BaseException:  # a failed request, or this coroutine is cancelled
                self._close()
                raise
            self._close_if_over()
            if text:
                return text
        raise StopAsyncIteration

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        self._close()

    def start(self) -> None:
        """Queues the request now; to be called on the event loop.

        Raises:
            UsageError: see `Runner.submit`.
        """
        loop, queue = asyncio.get_running_loop(), self._events

        def deliver(events: list[Event]) -> None:  # (which knows nothing of this object, so that it can be dropped)
            with suppress(RuntimeError):  # the loop has been closed: nobody waits any more
                loop.call_soon_threadsafe(queue.put_nowait, events)

        self._live = self._runner.submit(self._request, deliver)

    async def aclose(self) -> None:
        """Cancels the request, unless it is answered."""
        self._close()

    def _close_if_over(self) -> None:
        if self._collected.over:
            self._close()

    def _close(self) -> None:
        if not self._left:
            self._left = True
            if self._live is not None:
                self._runner.leave(self._live, over=self._collected.over)

    @property
    def result(self) -> Completion:
        """The answer; before its end, what there is so far ("cancelled").

        Raises:
            UsageError: nothing was waited for yet.
        """
        if self._live is None:
            raise UsageError("there is no result yet: iterate over the stream first")
        return self._collected.result(self._live)

    @property
    def scored(self) -> tuple[TokenInfo, ...]:
        """Log-probabilities of the prompt's tokens, where they were asked for."""
        return self._collected.scored

    async def finish(self) -> Completion:
        """The whole answer, once it is there."""
        async for _ in self:
            pass
        return self.result
