"""Between the engine's thread and the event loop: requests go in, their events come out, and who leaves is noticed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
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
        self._inboxes: dict[Live, _Inbox] = {}

    def start(self) -> None:
        """Starts the thread; to be called on the event loop."""
        self._loop = asyncio.get_running_loop()
        self.thread.start()

    async def events(
        self, engine: BatchEngine, request: Request, done: Callable[[Usage], None] | None = None
    ) -> AsyncIterator[Event]:
        """What a request is answered, until it is done. Whoever stops reading has cancelled it.

        Args:
            engine, request: see `EngineThread.submit`.
            done: is told what an answer took that came to its end.

        Raises:
            KbitError: the request cannot be taken, or failed.
        """
        live = Live(request, engine.tokenizer)
        inbox = self._inboxes[live] = _Inbox()
        over = False
        try:
            self.thread.submit(engine, live)
            while not over:
                for event in await inbox.take():
                    if isinstance(event, Failed):
                        over = True
                        raise event.error
                    if isinstance(event, Done):
                        over = True
                        if done is not None:
                            done(event.usage)
                    yield event
        finally:
            del self._inboxes[live]
            if not over:
                self.thread.cancel(live)

    def _deliver(self, batch: list[tuple[Live, list[Event]]]) -> None:
        assert self._loop is not None
        with suppress(RuntimeError):  # the loop has been closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._dispatch, batch)

    def _dispatch(self, batch: list[tuple[Live, list[Event]]]) -> None:
        for live, events in batch:
            inbox = self._inboxes.get(live)
            if inbox is not None:
                inbox.put(events)


class _Inbox:
    """Events on their way to one reader: a queue that is emptied at once."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._waiting: asyncio.Future[None] | None = None

    def put(self, events: list[Event]) -> None:
        """Adds some."""
        self._events += events
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    async def take(self) -> list[Event]:
        """All there are, at least one."""
        while not self._events:
            self._waiting = asyncio.get_running_loop().create_future()
            await self._waiting
        taken, self._events = self._events, []
        return taken


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
