"""A server over a small real model, for tests: in this process, or in one of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from starlette.testclient import TestClient

from kbit.backends.select import select_backend
from kbit.serve.app import ServeOptions, make_app
from kbit.serve.models import ModelOptions, Models

PATIENCE = 120.0  # against hanging only

TEMPLATE = (
    "{% if tools %}{{ 'call with <tool_call>: ' + tools[0].function.name + '\n' }}{% endif %}"
    "{% for m in messages %}"
    "{% if m.role == 'critic' %}{{ raise_exception('no critics here') }}{% endif %}"
    "{{ m.role + ': ' + m.content + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


def with_template(model: Path, folder: Path, template: str = TEMPLATE) -> Path:
    """A copy of a model that has a chat template."""
    shutil.copytree(model, folder)
    config = folder / "tokenizer_config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps({**settings, "chat_template": template}))
    return folder


@contextmanager
def serving(
    *named: tuple[str, Path], options: ServeOptions | None = None, any_name: bool = False, **engine: Any
) -> Iterator[TestClient]:
    """A client of a server whose first model is loaded."""
    backend = select_backend(threads=1)
    models = Models([(name, str(path)) for name, path in named], ModelOptions(backend, **engine), any_name=any_name)
    with TestClient(make_app(models, options), base_url="http://localhost", raise_server_exceptions=False) as client:
        name = named[0][0].partition(",")[0]
        while True:
            state = client.get(f"/v1/models/{name}", headers={"authorization": "Bearer right"}).json()["state"]
            assert state in ("unloaded", "loading", "ready")
            if state == "ready":
                break
        yield client


def events(response: Any) -> list[dict[str, Any]]:
    """The objects of a stream, which must end as it should."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def error_of(response: Any, status: int) -> dict[str, Any]:
    """The error of a response, which must be OpenAI's `Error` object."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert {"message", "type", "param", "code"} <= error.keys()
    assert "\n" not in error["message"]
    return dict(error)


@contextmanager
def server(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """(process, address, what it said at the start)."""
    command = [sys.executable, "-m", "kbit", "serve", *arguments, "--port", "0", "--threads", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ})
    assert process.stderr is not None
    said = []
    try:
        while not said or "OPENAI_BASE_URL" not in said[-1]:
            said.append(process.stderr.readline())
            assert said[-1], "".join(said)
        found = re.search(r" at (http://\S+)", said[0])
        assert found is not None
        yield process, found[1], said
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
