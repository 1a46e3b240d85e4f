"""Clients that do not read what they asked for, on a real socket: they lose their answer, and nobody else waits."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import uvicorn
from serve_cases import PATIENCE

from kbit.backends.select import select_backend
from kbit.serve import sse
from kbit.serve.app import make_app
from kbit.serve.models import ModelOptions, Models
from kbit.serve.run import listen


@pytest.fixture(scope="module")
def address(novels_folder: str) -> Iterator[tuple[str, int]]:
    """Of a server in this process, whose connections have small buffers."""
    models = Models([("novels", str(Path(novels_folder)))], ModelOptions(select_backend(threads=1)))
    (listening,) = listen("127.0.0.1", 0)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    server = uvicorn.Server(uvicorn.Config(make_app(models), log_level="error"))
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    host, port = listening.getsockname()[:2]
    until(lambda: server.started and httpx.get(f"http://{host}:{port}/health").status_code == 200)
    yield host, port
    server.should_exit = True
    thread.join(PATIENCE)


def until(true: object) -> None:
    end = time.monotonic() + PATIENCE
    while not true():  # type: ignore[operator]
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.01)


def ask(address: tuple[str, int], body: dict[str, object]) -> socket.socket:
    """Sends a request, and reads nothing."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(address)
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n"
    connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + content)
    return connection


def read(connection: socket.socket, end: bytes | None = None) -> bytes:
    """All that still comes, to some bytes or to its end."""
    connection.settimeout(PATIENCE)
    parts = []
    try:
        while part := connection.recv(1 << 16):
            parts.append(part)
            if end is not None and end in b"".join(parts[-2:]):
                break
    except ConnectionResetError:
        pass
    return b"".join(parts)


def test_who_reads_nothing_loses_the_answer_alone(address: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "_MOST_WAITING", 1 << 16)
    monkeypatch.setattr(sse, "_SLOW_SECONDS", 0.1)
    url = f"http://{address[0]}:{address[1]}"
    plain = {"prompt": "It was a dark and", "max_tokens": 12, "temperature": 0}
    expected = httpx.post(f"{url}/v1/completions", json=plain, timeout=PATIENCE).json()["choices"]
    much = {"prompt": "Once", "max_tokens": 400, "ignore_eos": True, "logprobs": 20, "n": 8, "stream": True}
    slow = ask(address, much)
    until(lambda: httpx.get(f"{url}/slots").json()[0]["running"] > 0)
    for _ in range(3):  # beside it
        assert httpx.post(f"{url}/v1/completions", json=plain, timeout=PATIENCE).json()["choices"] == expected
    until(lambda: httpx.get(f"{url}/slots").json()[0]["requests"] == 0)
    came = read(slow)
    assert came.startswith(b"HTTP/1.1 200")
    assert b"[DONE]" not in came
    slow.close()
    # Who reads late, but reads, gets all of it.
    late = ask(address, {**plain, "stream": True})
    until(lambda: httpx.get(f"{url}/slots").json()[0]["requests"] == 0)
    assert b"[DONE]" in read(late, b"[DONE]")
    late.close()
