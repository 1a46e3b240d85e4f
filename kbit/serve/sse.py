"""Server-sent events."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, suppress
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kbit.serve.bridge import disconnected
from kbit.serve.errors import ApiError, api_error

# A reader that takes nothing for so long is left: its answers end, and others get their seats. Sooner where more than
# so many bytes wait for it by then. (Small parts go on into the buffers of the network, so this counts from when these
# are full.) Until then what it is sent is kept, and nobody waits for it.
_SLOWEST_SECONDS, _SLOW_SECONDS, _MOST_WAITING = 60.0, 5.0, 1 << 20
_WRITE = 1 << 16  # bytes that are written at once: whoever takes them is not too slow

Objects = AsyncIterator["dict[str, Any] | tuple[str, dict[str, Any]]"]


class EventStream(Response):
    """A stream of JSON objects.

    Errors that are known before the first object are raised where it is made (`started`), so that they have a status; a
    later one is an event. The stream ends within a step of the engine when its reader has gone.

    Args:
        objects: what to send: objects, or (name of the event, object).
        end: data of a last event, or None.
        failure: makes the event that says what went wrong.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        objects: Objects,
        end: str | None = "[DONE]",
        failure: Callable[[ApiError], dict[str, Any] | tuple[str, dict[str, Any]]] = ApiError.openai,
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._objects = objects
        self._end = end
        self._failure = failure
        self._behind = 0  # bytes that wait to be written

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        wake, loop = asyncio.Event(), asyncio.get_running_loop()
        waiting: list[bytes] = []  # what is to be written; what is made meanwhile goes in one piece
        making = asyncio.ensure_future(self._make(waiting, wake, lambda: leave_after(_SLOW_SECONDS)))
        gone = asyncio.ensure_future(disconnected(HttpRequest(scope, receive)))
        for task in (making, gone):
            task.add_done_callback(lambda _: wake.set())
        writer = asyncio.current_task()
        assert writer is not None
        writing_since: float | None = None
        too_slow = False
        watch: asyncio.TimerHandle | None = None

        def leave_after(seconds: float) -> None:
            nonlocal too_slow
            if writing_since is not None and loop.time() - writing_since > seconds:
                too_slow = True
                writer.cancel()

        def check() -> None:
            nonlocal watch
            leave_after(_SLOWEST_SECONDS)
            watch = loop.call_later(_SLOWEST_SECONDS / 4, check)

        watch = loop.call_later(_SLOWEST_SECONDS / 4, check)
        try:
            while not gone.done():
                await wake.wait()
                wake.clear()
                over = making.done()
                if (waiting or over) and not gone.done():
                    data = b"".join(waiting)
                    waiting.clear()
                    self._behind = 0
                    for at in range(0, max(1, len(data)), _WRITE):
                        last = over and at + _WRITE >= len(data)
                        writing_since = loop.time()
                        body = data[at : at + _WRITE]
                        await send({"type": "http.response.body", "body": body, "more_body": not last})
                    writing_since = None
                if over:
                    break
        except OSError:
            pass  # the reader has gone
        except asyncio.CancelledError:
            if not too_slow:
                raise
        finally:
            if watch is not None:
                watch.cancel()
            for task in (making, gone):
                if not task.done():
                    task.cancel()
                    with suppress(asyncio.CancelledError, Exception):
                        await task
        if making.done() and not making.cancelled():
            making.result()

    async def _make(self, waiting: list[bytes], wake: asyncio.Event, behind: Callable[[], None]) -> None:
        """Encodes all objects into `waiting`, and wakes the writer up: once for all that come without a pause.

        Args:
            behind: called where too much waits.
        """
        async with aclosing(self._objects) as objects:  # type: ignore[type-var]
            try:
                async for each in objects:
                    data = _encoded(each)
                    waiting.append(data)
                    self._behind += len(data)
                    wake.set()
                    if self._behind > _MOST_WAITING:
                        behind()
            except Exception as error:
                told = api_error(error)
                if told.status >= 500:
                    sys.stderr.write(f"kbit: error: {told.message}\n")
                waiting.append(_encoded(self._failure(told)))
        if self._end is not None:
            waiting.append(f"data: {self._end}\n\n".encode())


async def started(objects: Objects) -> Objects:
    """The same objects, of which the first is there already.

    Raises:
        Exception: what kept it from being made.
    """
    try:
        first = await anext(objects)
    except StopAsyncIteration:
        return objects
    return _Begun(first, objects)


class _Begun:
    """Objects of which the first is there already."""

    def __init__(self, first: Any, rest: Any) -> None:
        self._first: list[Any] = [first]
        self._rest = rest

    def __aiter__(self) -> _Begun:
        return self

    def __anext__(self) -> Awaitable[Any]:
        return self._begin() if self._first else self._rest.__anext__()

    async def _begin(self) -> Any:
        return self._first.pop()

    async def aclose(self) -> None:
        """Ends what makes the rest."""
        await self._rest.aclose()


_ENCODE = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def _encoded(each: dict[str, Any] | tuple[str, dict[str, Any]]) -> bytes:
    name, data = each if isinstance(each, tuple) else (None, each)
    line = f"data: {_ENCODE(data)}\n\n"
    return (line if name is None else f"event: {name}\n{line}").encode("utf-8", errors="replace")
