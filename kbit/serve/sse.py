"""Server-sent events."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, suppress
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kbit.serve.bridge import disconnected
from kbit.serve.errors import ApiError, api_error

# A reader that takes nothing for so long is not waited for. (Small parts go on into the buffers of the network, so this
# counts from when these are full.)
_SLOWEST_SECONDS = 60.0

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

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        sending = asyncio.ensure_future(self._send_all(send))
        gone = asyncio.ensure_future(disconnected(HttpRequest(scope, receive)))
        try:
            await asyncio.wait((sending, gone), return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            for task in (sending, gone):
                if not task.done():
                    task.cancel()
                    with suppress(asyncio.CancelledError, Exception):
                        await task

    async def _send_all(self, send: Send) -> None:
        async def put(data: bytes, more: bool = True) -> None:
            message = {"type": "http.response.body", "body": data, "more_body": more}
            await asyncio.wait_for(send(message), _SLOWEST_SECONDS)

        async with aclosing(self._objects) as objects:  # type: ignore[type-var]
            try:
                async for each in objects:
                    await put(_encoded(each))
            except (OSError, asyncio.TimeoutError):
                return  # the reader has gone, or does not read
            except Exception as error:
                told = api_error(error)
                if told.status >= 500:
                    sys.stderr.write(f"kbit: error: {told.message}\n")
                await put(_encoded(self._failure(told)))
            if self._end is not None:
                await put(f"data: {self._end}\n\n".encode())
            await put(b"", more=False)


async def started(objects: Objects) -> Objects:
    """The same objects, of which the first is there already.

    Raises:
        Exception: what kept it from being made.
    """
    first = await anext(objects, None)

    async def all_of_them() -> Objects:
        async with aclosing(objects):  # type: ignore[type-var]
            if first is not None:
                yield first
            async for each in objects:
                yield each

    return all_of_them()


def _encoded(each: dict[str, Any] | tuple[str, dict[str, Any]]) -> bytes:
    name, data = each if isinstance(each, tuple) else (None, each)
    line = f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"
    return (line if name is None else f"event: {name}\n{line}").encode("utf-8", errors="replace")
