"""Who may use the server: keys, the names it goes by, the size of what it reads. Plain ASGI: bodies still stream.

Any page that a browser shows can send requests to a server on the same machine. So nothing is allowed to other origins
unless a flag says so, and a server on loopback answers only under loopback's names (against DNS rebinding).
"""

from __future__ import annotations

import hmac
import json
import re
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kbit.serve.errors import ApiError

LOOPBACK = ("localhost", "127.0.0.1", "::1")
# Without a key: whether the server is well, and the page, which asks for one.
_OPEN = frozenset({"/health", "/v1/health", "/"})


def origin_pattern(origins: Collection[str]) -> str:
    """A regular expression of the origins that these are: "*" is any, "localhost" the pages of this machine."""
    known = {"*": ".*", "localhost": r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"}
    return "|".join(known.get(origin, re.escape(origin)) for origin in origins)


class Access:
    """Refuses what must not come through.

    Args:
        app: what is behind it.
        keys: any of them lets a request in; none: all are let in.
        hosts: names in the Host header that are answered; None: all.
        origins: of pages that may use the server, besides its own; see `origin_pattern`.
        most_bytes: of a request's body.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Collection[str] = (),
        hosts: Collection[str] | None = None,
        origins: Collection[str] = (),
        most_bytes: int = 32 << 20,
    ) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]
        self._hosts = hosts
        self._origins = re.compile(origin_pattern(origins)) if origins else None
        self._most_bytes = most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        error = self._refusal(scope, headers)
        if error is not None:
            if scope["method"] == "OPTIONS" and error.status == 403 and "origin" in headers:
                # A browser asks beforehand: an answer that allows nothing is a no.
                await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
                await send({"type": "http.response.body", "body": b""})
                return
            await refuse(scope, send, error)
            return
        read, refused = 0, False

        async def counted() -> Message:
            nonlocal read, refused
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._most_bytes and not refused:
                refused = True
                await refuse(scope, send, self._too_large())
            return {"type": "http.disconnect"} if refused else message

        async def unless_refused(message: Message) -> None:
            if refused:
                return
            if message["type"] == "http.response.start":  # names as people write them: some programs compare letters
                named = [(name.title(), value) for name, value in message.get("headers", ())]
                message = {**message, "headers": named}
            await send(message)

        await self._app(scope, counted, unless_refused)

    def _refusal(self, scope: Scope, headers: Headers) -> ApiError | None:
        host = _name(headers.get("host", ""))
        if self._hosts is not None and host not in self._hosts:
            return ApiError(
                403, f"this server does not answer to the name {host[:100]!r}: use localhost, or start it with --host"
            )
        origin = headers.get("origin")
        if origin is not None and not self._allowed(origin) and _name(urlsplit(origin).netloc) != host:
            return ApiError(
                403, f"pages of {origin[:100]} may not use this server: start it with --cors-origin {origin[:100]}"
            )
        if self._keys and scope["path"] not in _OPEN and scope["method"] != "OPTIONS":
            scheme, _, given = headers.get("authorization", "").partition(" ")
            key = given.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
            if not any(hmac.compare_digest(key.encode(), known) for known in self._keys):
                wrong = "the API key is wrong" if key else "there is no API key"
                return ApiError(401, f"{wrong}: send it as Authorization: Bearer KEY", code="invalid_api_key")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self._most_bytes:
            return self._too_large()
        return None

    def _allowed(self, origin: str) -> bool:
        return self._origins is not None and self._origins.fullmatch(origin) is not None

    def _too_large(self) -> ApiError:
        return ApiError(
            413, f"the request's body is larger than {self._most_bytes} bytes: send less", code="request_too_large"
        )


def _name(host: str) -> str:
    """A Host header without its port."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


async def refuse(scope: Scope, send: Send, error: ApiError) -> None:
    """Answers with an error."""
    body = error.anthropic() if scope["path"].startswith("/v1/messages") else error.openai()
    data = json.dumps(body).encode()
    headers = {"content-type": "application/json", "content-length": str(len(data)), "connection": "close"}
    raw = [(name.lower().encode(), value.encode()) for name, value in {**headers, **error.headers}.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": data})
