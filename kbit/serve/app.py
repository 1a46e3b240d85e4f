"""The application: routes, errors, who may use it."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from time import time
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from kbit.engine.engine_thread import QueueFullError
from kbit.host.errors import KbitError, one_line
from kbit.host.process import give_back_free_memory
from kbit.serve import anthropic, basics, chat, completions, infill, native, page, predict, responses, slots
from kbit.serve.access import Access, origin_pattern
from kbit.serve.bridge import Bridge, ClientGoneError
from kbit.serve.errors import ApiError, api_error
from kbit.serve.metrics import Metrics
from kbit.serve.models import Models
from kbit.serve.state import Server

# Seconds that requests under way have to end when the server stops, after which they are ended.
DRAIN_SECONDS = 600.0
TIDY_SECONDS = 10.0


@dataclass(frozen=True)
class ServeOptions:
    """How a server behaves.

    Attributes:
        keys, hosts, origins, most_bytes: see `Access`.
        most_requests, most_tokens: that wait; see `EngineThread`.
        without: see `Server`.
    """

    keys: Collection[str] = ()
    hosts: Collection[str] | None = None
    origins: Collection[str] = ()
    most_bytes: int = 32 << 20
    most_requests: int = 256
    most_tokens: int = 1 << 20
    without: Collection[str] = ()


def make_app(models: Models, options: ServeOptions | None = None) -> FastAPI:
    """The application that serves models. The first of them begins to load when it starts.

    Args:
        models: which.
        options: how.
    """
    options = options or ServeOptions()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        bridge = Bridge(options.most_requests, options.most_tokens)
        bridge.start()
        metrics = Metrics(models, bridge.thread)
        app.state.server = Server(models, bridge, metrics, time(), frozenset(options.without))
        tasks = [asyncio.ensure_future(_load_first(models)), asyncio.ensure_future(_tidy())]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            bridge.thread.stop(drain=False, timeout=60)

    middleware = [
        Middleware(
            Access, keys=options.keys, hosts=options.hosts, origins=options.origins, most_bytes=options.most_bytes
        )
    ]
    if options.origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origin_regex=origin_pattern(options.origins),
                allow_methods=["GET", "POST", "DELETE", "OPTIONS"],
                allow_headers=["*"],
            )
        )
    app = FastAPI(
        title="kbit",
        lifespan=lifespan,
        middleware=middleware,
        docs_url=None,  # these pages load scripts from elsewhere
        redoc_url=None,
        exception_handlers={
            ApiError: _told,
            KbitError: _told,
            RequestValidationError: _invalid,
            ValidationError: _invalid,  # of a body that was put into another API's words
            HTTPException: _http,
            ClientGoneError: _gone,
            Exception: _told,
        },
    )
    for routes in (basics, completions, chat, responses, anthropic, native, infill, slots, predict, page):
        app.include_router(routes.router)
    return app


async def _load_first(models: Models) -> None:
    with suppress(KbitError):  # kept in the model, and told by whoever runs the server
        await models.ready(None)


async def _tidy() -> None:
    """What large requests took is given back now and then: it would stay with the process otherwise."""
    while True:
        await asyncio.sleep(TIDY_SECONDS)
        await asyncio.to_thread(give_back_free_memory)


async def _told(http: HttpRequest, error: Exception) -> Response:
    told = api_error(error)
    if isinstance(error, QueueFullError):
        http.app.state.server.metrics.refused()
    if told.status >= 500 and not isinstance(error, (ApiError, KbitError)):
        sys.stderr.write(f"kbit: {told.message}\n")
    body = told.anthropic() if http.url.path.startswith("/v1/messages") else told.openai()
    return JSONResponse(body, status_code=told.status, headers=told.headers)


async def _invalid(http: HttpRequest, error: Exception) -> Response:
    """A body that is no JSON, or not what the schema says."""
    assert isinstance(error, (RequestValidationError, ValidationError))
    return await _told(http, _first_mistake(error.errors()))


def _first_mistake(mistakes: Any) -> ApiError:
    mistake: Mapping[str, Any] = mistakes[0]
    place = [part for part in mistake.get("loc", ()) if part != "body"]
    name = ".".join(str(part) for part in place if not _is_branch(part)) or None
    message = one_line(mistake.get("msg", "is wrong"), 300)
    if mistake.get("type") == "json_invalid":
        detail = one_line((mistake.get("ctx") or {}).get("error", ""), 200)
        return ApiError(
            400, f"the body is not JSON: {detail} at character {place[0] if place else 0}", code="invalid_json"
        )
    if mistake.get("type") == "extra_forbidden":
        return ApiError(
            400, f"{name}: this server does not know this field: leave it out", param=name, code="unknown_field"
        )
    if name is None:
        return ApiError(400, f"the body is no JSON object with Content-Type application/json: {message}")
    return ApiError(400, f"{name}: {message}", param=name, code="invalid_value")


def _is_branch(part: object) -> bool:
    """pydantic names the members of a union in a place: list[str], function-after[...]."""
    return isinstance(part, str) and (part in ("str", "int", "float", "bool") or not part.replace("_", "").isalnum())


async def _http(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = http.url.path[:200]
    messages = {404: f"there is no {path} here", 405: f"{http.method} is not what {path} takes"}
    return await _told(http, ApiError(error.status_code, messages.get(error.status_code, str(error.detail))))


class _NoResponse(Response):
    """To nobody."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        pass


async def _gone(http: HttpRequest, error: Exception) -> Response:
    return _NoResponse()
