"""Running the application: sockets, what is said at the start, an orderly end."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from contextlib import suppress
from typing import Any

import uvicorn
from fastapi import FastAPI

from kbit.host.errors import KbitError
from kbit.serve.app import DRAIN_SECONDS
from kbit.serve.models import Models, ServedModel
from kbit.serve.state import Server


def listen(host: str, port: int) -> list[socket.socket]:
    """Sockets on an address, or on several with commas between, which have one port.

    Raises:
        KbitError: there are none to be had.
    """
    found: list[socket.socket] = []
    for each in host.split(","):
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(each, port, type=socket.SOCK_STREAM)[0]
            made = socket.socket(family, kind, protocol)
            found.append(made)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(address)
            made.listen(1024)
        except OSError as error:
            for opened in found:
                opened.close()
            why = error.strerror or str(error)
            raise KbitError(f"--host {each} --port {port}: {why}: choose another address or port (--port 0)") from None
        port = made.getsockname()[1]
    return found


class _Quiet(uvicorn.Server):
    """Ctrl-C once drains, twice quits; and it says so."""

    def __init__(self, config: uvicorn.Config, app: FastAPI) -> None:
        super().__init__(config)
        self._app = app
        self._asked = 0

    def handle_exit(self, sig: int, frame: Any) -> None:
        # The second one may come while the first is being handled: what is asked for is counted, and said without
        # Python's buffers, which do not take a writer inside a writer.
        self._asked += 1
        if self._asked > 1:
            _say_at_once("kbit: quitting")
            os._exit(128 + signal.SIGINT)  # nothing is being written that could be left half done
        server: Server | None = getattr(self._app.state, "server", None)
        active = 0 if server is None else server.bridge.thread.active
        if server is not None:
            server.bridge.thread.refuse()
        if active:
            _say_at_once(f"kbit: finishing {active} request{'s' if active != 1 else ''}; Ctrl-C again quits")
        super().handle_exit(sig, frame)


def run(
    app: FastAPI, models: Models, sockets: list[socket.socket], *, tls: tuple[str | None, str | None], keyed: bool
) -> None:
    """Serves until it is told to stop.

    Args:
        app: of `make_app`.
        models: that it serves.
        sockets: to listen on.
        tls: certificate and key, or None twice.
        keyed: clients need a key.

    Raises:
        KbitError: the first model cannot be loaded.
    """
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=int(DRAIN_SECONDS),
        timeout_keep_alive=75,
        ssl_certfile=tls[0],
        ssl_keyfile=tls[1],
        server_header=False,
    )
    host, port = sockets[0].getsockname()[:2]
    address = f"[{host}]" if ":" in host else host
    url = f"http{'s' if tls[0] else ''}://{'localhost' if host in ('0.0.0.0', '::') else address}:{port}"
    server = _Quiet(config, app)

    async def tell() -> None:
        while models.first.state in ("unloaded", "loading"):
            await asyncio.sleep(0.02)
        if models.first.state == "failed":
            server.should_exit = True
            return
        for line in greeting(models, url, keyed=keyed):
            _say(line)

    async def serve() -> None:
        told = asyncio.ensure_future(tell())
        try:
            await server.serve(sockets)
        finally:
            told.cancel()

    with suppress(KeyboardInterrupt):  # which uvicorn raises again once it has drained
        asyncio.run(serve())
    if models.first.state == "failed":
        raise models.first.error or KbitError(f"{models.first.name} could not be loaded")


def greeting(models: Models, url: str, *, keyed: bool) -> list[str]:
    """What is said when the first model is ready."""
    first, key = models.first, " -H 'Authorization: Bearer KEY'" if keyed else ""
    lines = [f"kbit serves {', '.join(model.name for model in models)} at {url}", *_facts(first)]
    if first.embedder is not None:
        path, body = "embeddings", f'{{"model": "{first.name}", "input": "Hello"}}'
    elif first.tokenizer.chat_template is not None:
        message = '{"role": "user", "content": "What is the capital of France?"}'
        path, body = "chat/completions", f'{{"model": "{first.name}", "messages": [{message}]}}'
    else:
        path, body = "completions", f'{{"model": "{first.name}", "prompt": "Once upon a time"}}'
    lines.append(f"  curl {url}/v1/{path}{key} -H 'Content-Type: application/json' -d '{body}'")
    lines.append(f"  export OPENAI_BASE_URL={url}/v1 OPENAI_API_KEY={'KEY' if keyed else 'none'}")
    return lines


def _facts(model: ServedModel) -> list[str]:
    if model.loaded is None or model.engine is None:
        return []
    weights, pool = model.loaded.decoder.weights.nbytes, model.engine.pool
    return [
        f"  {model.loaded.backend_description}",
        f"  weights {weights / 1e6:.0f} MB; keys and values of {pool.count * 64} tokens in {pool.nbytes / 1e6:.0f} MB; "
        f"context {model.engine.context}",
        f"  where a request does not say: {model.defaults}",
    ]


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def _say_at_once(line: str) -> None:
    """From within a signal's handler."""
    with suppress(OSError, ValueError):  # who is gone need not hear it
        os.write(sys.stderr.fileno(), f"{line}\n".encode())
