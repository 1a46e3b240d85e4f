"""Requests to a server in this process, over a tiny model."""

from __future__ import annotations

import json
import os
import shutil
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from starlette.testclient import TestClient

from fuzzing.target import CORPUS, JsonTarget
from kbit.backends.select import select_backend
from kbit.serve.app import make_app
from kbit.serve.models import ModelOptions, Models

MODEL = CORPUS.parent / "model"
_METHODS = ("GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD")


class InternalError(Exception):
    """The server answered that it failed, which no request may make it do."""


class Http(JsonTarget):
    """{"method": .., "path": .., "headers": .., "body": ..}: a body that is a text goes as it is, others as JSON."""

    longest = 1 << 14
    values = (
        *("tiny", "user", "assistant", "system", "tool", "json_object", "json_schema", "regex", "auto", "required"),
        *(
            "/v1/completions",
            "/v1/chat/completions",
            "/v1/responses",
            "/v1/messages",
            "/tokenize",
            "/v1/models",
            "text",
        ),
        *("[0-9]+", "(a|b)*c", {"type": "object"}, {"type": "string"}, [258], "a" * 5000),
    )

    def __init__(self, scratch: Path) -> None:
        super().__init__(scratch)
        os.environ["KBIT_CACHE"] = str(scratch / "cache")
        os.environ["KBIT_PREPARED"] = str(scratch / "prepared")
        folder = scratch / "tiny"
        shutil.copytree(MODEL, folder)
        models = Models([("tiny", str(folder))], ModelOptions(select_backend(threads=1)))
        self._stack = ExitStack()
        client = TestClient(make_app(models), base_url="http://localhost", raise_server_exceptions=False)
        self._client = self._stack.enter_context(client)
        while self._client.get("/v1/models/tiny").json()["state"] != "ready":
            time.sleep(0.05)

    def run(self, data: bytes) -> None:
        try:
            request = json.loads(data)
        except (ValueError, RecursionError):
            request = {"body": data.decode("utf-8", "replace")}
        if not isinstance(request, dict):
            return
        method, path = request.get("method"), request.get("path")
        method = method if method in _METHODS else "POST"
        path = path if isinstance(path, str) and path.startswith("/") and path.isprintable() else "/v1/completions"
        body = request.get("body")
        content = body.encode("utf-8", "surrogatepass") if isinstance(body, str) else json.dumps(body).encode()
        headers = {"content-type": "application/json", **_headers(request.get("headers"))}
        response = self._client.request(method, path, content=content, headers=headers)
        if response.status_code >= 500 and response.status_code != 503:
            raise InternalError(f"{method} {path}: {response.status_code}: {response.text[:500]}")
        if "internal error" in response.text or "model_failed" in response.text:
            raise InternalError(f"{method} {path}: {response.text[:500]}")  # in a stream, which begins with 200

    def close(self) -> None:
        self._stack.close()


def _headers(value: Any) -> dict[str, str]:
    """What the client's library sends without a word."""
    if not isinstance(value, dict):
        return {}
    names = {name.lower(): text for name, text in value.items() if name.isascii() and name.isidentifier()}
    return {
        name.replace("_", "-"): text
        for name, text in names.items()
        if isinstance(text, str) and text.isascii() and text.isprintable() and name not in ("host", "content_length")
    }
