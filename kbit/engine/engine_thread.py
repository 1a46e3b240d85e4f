"""The thread that batch engines run on: one for all models of a process, since all share its processors."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from time import monotonic
from typing import Any, Literal, TypeVar

from kbit.engine.answers import Event, Failed
from kbit.engine.batch_engine import BatchEngine, Live
from kbit.host.errors import KbitError

Deliver = Callable[[list[tuple[Live, list[Event]]]], None]
_Task = tuple[Callable[[], Any], "Future[Any]"]
_Command = tuple[Literal["add", "cancel", "stop", "call"], "BatchEngine | None", "Live | _Task | None"]
T = TypeVar("T")


class QueueFullError(KbitError):
    """Too much waits already.

    Attributes:
        retry_after: seconds after which there may be room, by the speed of late.
    """

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class StoppedError(KbitError):
    """The engine takes no requests any more."""


class EngineThread:
    """Runs engines in turns, a step at a time, and hands out what they answer.

    Args:
        deliver: called on this thread after every step with the events of all requests that have some, in order; it
            must return at once.
        most_requests, most_tokens: of requests that wait for their first step; more are refused.
    """

    def __init__(self, deliver: Deliver, most_requests: int = 256, most_tokens: int = 1 << 20) -> None:
        self._deliver = deliver
        self._most_requests, self._most_tokens = most_requests, most_tokens
        self._inbox: SimpleQueue[_Command] = SimpleQueue()
        self._lock = threading.Lock()
        self._queued: dict[Live, int] = {}  # tokens of requests that have not begun
        self._active: dict[Live, BatchEngine] = {}  # what was submitted and is not over
        self._engines: dict[BatchEngine, None] = {}  # that have, or may have, work
        self._since: float | None = None  # when the last step ended, or work came; None: there is none
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="kbit-engine", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def submit(self, engine: BatchEngine, live: Live) -> None:
        """Queues a request. For any thread.

        Raises:
            UsageError: the engine cannot take such a request (`BatchEngine.check`).
            QueueFullError: too much waits already.
            StoppedError: `stop` was called.
        """
        engine.check(live.request)
        tokens = len(live.request.prompt)
        with self._lock:
            if self._stopping:
                raise StoppedError("the server is shutting down: try again when it is back")
            waiting = sum(self._queued.values())
            if len(self._queued) >= self._most_requests or (waiting and waiting + tokens > self._most_tokens):
                raise QueueFullError(
                    f"{len(self._queued)} requests of {waiting} tokens wait already, of at most {self._most_requests} "
                    f"and {self._most_tokens}: try again later",
                    self._retry_after(engine, waiting),
                )
            self._queued[live] = tokens
            self._active[live] = engine
            if self._since is None:
                self._since = monotonic()
        self._inbox.put(("add", engine, live))

    def cancel(self, live: Live) -> None:
        """Lets go of a request within a step, wherever it is; no events of it follow that. For any thread."""
        self._inbox.put(("cancel", None, live))

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Runs a function between two steps; what it returns or raises. For any thread.

        Raises:
            StoppedError: `stop` was called.
        """
        if self._stopping:
            raise StoppedError("the server is shutting down: try again when it is back")
        future: Future[T] = Future()
        self._inbox.put(("call", None, (function, future)))
        return future

    @property
    def queued(self) -> int:
        """Requests that have not begun."""
        return len(self._queued)

    @property
    def active(self) -> int:
        """Requests that are not over, those that have not begun among them."""
        return len(self._active)

    @property
    def stalled_seconds(self) -> float:
        """How long there has been work without a step having ended."""
        since = self._since
        return 0.0 if since is None else monotonic() - since

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def stop(self, *, drain: bool = True, timeout: float | None = None) -> bool:
        """Ends the thread; no new requests are taken.

        Args:
            drain: after all requests are answered; else after the step under way.
            timeout: seconds to wait for that.

        Returns:
            Whether the thread has ended.
        """
        with self._lock:
            self._stopping = True
        if not drain:
            self._inbox.put(("stop", None, None))
        else:
            self._inbox.put(("cancel", None, None))  # wakes it up
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def refuse(self) -> None:
        """Takes no new requests from now on; those there are go on."""
        with self._lock:
            self._stopping = True

    def _run(self) -> None:
        while self._take_commands(block=not self._engines) and self._turn():
            if self._stopping and not self._active:
                return

    def _turn(self) -> bool:
        """A step of every engine that has work; False: to stop. No engine is held on to that has none."""
        for engine in list(self._engines):
            if not len(engine):
                del self._engines[engine]
                continue
            try:
                events = engine.step()
            except Exception as error:  # a mistake of ours: say so to all who wait, and go on
                events = [(live, [Failed(error)]) for live in engine.cancel_all()]
            self._after_step(events)
            if not self._take_commands(block=False):
                return False
        return True

    def _take_commands(self, *, block: bool) -> bool:
        """Does what was asked for since; False: to stop."""
        if block and self._stopping and not self._active:
            return True
        while True:
            try:
                kind, engine, what = self._inbox.get(block=block)
            except Empty:
                return True
            block = False
            if kind == "stop":
                return False
            if isinstance(what, tuple):
                _do(*what)
                continue
            live = what
            if kind == "add" and engine is not None and live is not None:
                self._engines[engine] = None
                try:
                    if live in self._active:
                        engine.add(live)
                except KbitError as error:
                    self._forget(live)
                    self._deliver([(live, [Failed(error)])])
            elif live is not None and live in self._active:
                self._active[live].cancel(live)
                self._forget(live)

    def _after_step(self, events: list[tuple[Live, list[Event]]]) -> None:
        with self._lock:
            for live in [each for each in self._queued if each.begun is not None]:
                del self._queued[live]
            for live, _ in events:
                if live in self._active and not self._active[live].has(live):
                    self._active.pop(live)
                    self._queued.pop(live, None)
            self._since = monotonic() if self._active else None
        if events:
            self._deliver(events)

    def _forget(self, live: Live) -> None:
        with self._lock:
            self._queued.pop(live, None)
            self._active.pop(live, None)
            if not self._active:
                self._since = None

    def _retry_after(self, engine: BatchEngine, tokens: int) -> int:
        done = engine.counters
        speed = done.computed_tokens / done.step_seconds if done.step_seconds else 100.0
        return int(min(max(tokens / speed, 1), 60))


def _do(function: Callable[[], Any], future: Future[Any]) -> None:
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(function())
        except Exception as error:
            future.set_exception(error)
