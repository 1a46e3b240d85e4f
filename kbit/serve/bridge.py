"""Between the engine's thread and the event loop: requests go in, their events come out, and who leaves is noticed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest

from kbit.engine.answers import Done, Event, Failed, Finish, Piece, PromptScored, Request, TokenInfo, Usage
from kbit.engine.batch_engine import BatchEngine, Live
from kbit.engine.engine_thread import EngineThread

T = TypeVar("T")


class ClientGoneError(Exception):
    """Nobody waits for the answer."""


class Bridge:
    """The engine's thread, for coroutines of one event loop.

    Args:
        most_requests, most_tokens: see `EngineThread`.

    Attributes:
        thread: the engine's.
    """

    def __init__(self, most_requests: int = 256, most_tokens: int = 1 << 20) -> None:
        self.thread = EngineThread(self._deliver, most_requests, most_tokens)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._queues: dict[Live, asyncio.Queue[list[Event]]] = {}

    def start(self) -> None:
        """Starts the thread; to be called on the event loop."""
        self._loop = asyncio.get_running_loop()
        self.thread.start()

    async def events(self, engine: BatchEngine, request: Request) -> AsyncIterator[Event]:
        """What a request is answered, until it is done. Whoever stops reading has cancelled it.

        Raises:
            KbitError: the request cannot be taken, or failed.
        """
        live = Live(request, engine.tokenizer)
        queue: asyncio.Queue[list[Event]] = asyncio.Queue()
        self._queues[live] = queue
        over = False
        try:
            self.thread.submit(engine, live)
            while not over:
                for event in await queue.get():
                    over = isinstance(event, (Done, Failed))
                    if isinstance(event, Failed):
                        raise event.error
                    yield event
        finally:
            del self._queues[live]
            if not over:
                self.thread.cancel(live)

    def _deliver(self, batch: list[tuple[Live, list[Event]]]) -> None:
        assert self._loop is not None
        with suppress(RuntimeError):  # the loop has been closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._dispatch, batch)

    def _dispatch(self, batch: list[tuple[Live, list[Event]]]) -> None:
        for live, events in batch:
            queue = self._queues.get(live)
            if queue is not None:
                queue.put_nowait(events)


@dataclass
class Whole:
    """All of one choice."""

    text: str = ""
    tokens: list[TokenInfo] = field(default_factory=list)
    finish: Finish = "cancelled"
    stop: str | None = None


@dataclass
class Answered:
    """All that a request was answered.

    Attributes:
        choices: in order.
        prompt: log-probabilities of its tokens, where they were asked for.
        usage: what it took.
    """

    choices: list[Whole]
    prompt: tuple[TokenInfo, ...] = ()
    usage: Usage | None = None


async def collect(events: AsyncIterator[Event], choices: int) -> Answered:
    """Reads a request's events to their end."""
    answered = Answered([Whole() for _ in range(choices)])
    async for event in events:
        if isinstance(event, PromptScored):
            answered.prompt = event.tokens
        elif isinstance(event, Done):
            answered.usage = event.usage
        elif isinstance(event, Piece):
            choice = answered.choices[event.choice]
            choice.text += event.text
            choice.tokens += event.tokens
            choice.finish, choice.stop = event.finish or choice.finish, event.stop
    return answered


async def together(runs: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All results in order; where one fails or this is cancelled, all are."""
    tasks = [asyncio.ensure_future(run) for run in runs]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


async def while_connected(http: HttpRequest, work: Coroutine[Any, Any, T]) -> T:
    """The result of some work, which is cancelled where the client goes away first.

    Raises:
        ClientGoneError: it went away.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(disconnected(http))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        for each in (task, gone):
            if not each.done():
                each.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await each


async def disconnected(http: HttpRequest) -> None:
    """Returns when the client has gone. Only for requests whose body was read."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
