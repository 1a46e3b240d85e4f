"""Several `kbit serve` on a Ray cluster behind one address, each asked for the prompts whose beginnings it knows.

    pip install 'kbit[serve]' 'ray[serve]'
    serve run kbit.serve.ray_replicas:build models=out/ replicas=2

docs/recipes.md has the rest. A replica is a process of `kbit serve`, with its flags; what stands before it passes on
requests and answers as they are, piece by piece, and a client that leaves is felt there.
"""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import sys
from collections import deque
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import aiohttp
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import RequestRouter
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from kbit.host.errors import KbitError, UsageError
from kbit.serve.prefixes import PrefixTable, beginning

# Of one connection only, or set anew by who answers.
_HOPS = {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "host", "content-length"}
# Seconds that a server may take until it is ready: a model may have to be prepared first.
_START_SECONDS = 3600.0


@dataclass(frozen=True)
class Forwarded:
    """A request on its way to a replica.

    Attributes:
        method, path, headers, body: of HTTP; the path with its query.
        beginning: what its prompt begins with.
    """

    method: str
    path: str
    headers: list[tuple[str, str]]
    body: bytes
    beginning: str


class PrefixRouter(RequestRouter):  # type: ignore[misc]  # (Ray is not checked here)
    """Whoever knows the longest beginning of a prompt, unless it has much more to do than the idlest one."""

    def initialize_state(self, imbalance: int = 8) -> None:
        """
        Args:
            imbalance: so many more requests than the idlest one has are too many.
        """
        self._imbalance = imbalance
        self._table: PrefixTable[Any] = PrefixTable()

    async def choose_replicas(self, candidate_replicas: list[Any], pending_request: Any = None) -> list[list[Any]]:
        """Replicas to try, in ranks, the best first."""
        loads = {each.replica_id: self.replica_queue_len_cache.get(each.replica_id) or 0 for each in candidate_replicas}
        least = min(loads.values(), default=0)
        text = pending_request.args[0].beginning if pending_request is not None else ""
        near = [each for each, load in loads.items() if load <= least + self._imbalance]
        _, knowing = self._table.longest(text, near)
        idle = sorted(candidate_replicas, key=lambda each: loads[each.replica_id])
        known = [each for each in idle if each.replica_id in knowing]
        return [[each] for each in known + [each for each in idle if each not in known]]

    def on_request_routed(self, pending_request: Any, replica_id: Any, result: Any) -> None:
        """What a replica was asked it knows from now on."""
        self._table.remember(pending_request.args[0].beginning, replica_id)

    def on_replica_actor_died(self, replica_id: Any) -> None:
        """A new one knows nothing."""
        super().on_replica_actor_died(replica_id)
        self._table.forget(replica_id)


class Replica:
    """One `kbit serve`.

    Args:
        models: its arguments.
        flags: its flags.
    """

    def __init__(self, models: list[str], flags: list[str]) -> None:
        self._command = [sys.executable, "-m", "kbit", "serve", *models, "--host", "127.0.0.1", "--port", "0", *flags]
        self._said: deque[str] = deque(maxlen=20)
        self._ready = asyncio.ensure_future(self._start())

    async def _start(self) -> tuple[asyncio.subprocess.Process, aiohttp.ClientSession]:
        process = await asyncio.create_subprocess_exec(*self._command, stderr=asyncio.subprocess.PIPE)
        address = None
        while address is None:
            line = await self._line(process)
            if not line:
                raise KbitError("kbit serve did not start: " + " ".join(self._said))
            found = re.search(r"https?://[\d.]+:\d+", line)
            address = found[0] if found else None
        self._reading = asyncio.ensure_future(self._read(process))
        session = aiohttp.ClientSession(address, timeout=aiohttp.ClientTimeout(total=None), auto_decompress=False)
        until = asyncio.get_running_loop().time() + _START_SECONDS
        while process.returncode is None and asyncio.get_running_loop().time() < until:
            async with session.get("/health") as answer:
                if answer.status == 200:
                    return process, session
            await asyncio.sleep(0.1)
        await session.close()
        raise KbitError("kbit serve did not become ready: " + " ".join(self._said))

    async def _line(self, process: asyncio.subprocess.Process) -> str:
        assert process.stderr is not None
        line = (await process.stderr.readline()).decode("utf-8", "replace")
        if line.strip():
            self._said.append(line.strip())
            sys.stderr.write(line)
        return line

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        while await self._line(process):
            pass

    async def check_health(self) -> None:
        """Ray starts another replica where this raises.

        Raises:
            KbitError: the server is gone, or no step of it has ended for some time.
        """
        if not self._ready.done():
            return
        process, session = self._ready.result()
        if process.returncode is not None:
            raise KbitError(f"kbit serve ended with {process.returncode}: " + " ".join(self._said))
        async with session.get("/health") as answer:
            if answer.status != 200:
                raise KbitError(f"kbit serve is not well: {await answer.text()}")

    async def __call__(self, request: Forwarded) -> AsyncIterator[tuple[int, list[tuple[str, str]]] | bytes]:
        """Status and headers, then the body in pieces as they come."""
        _, session = await asyncio.shield(self._ready)
        async with session.request(
            request.method, request.path, headers=request.headers, data=request.body, allow_redirects=False
        ) as answer:
            yield answer.status, [(name, value) for name, value in answer.headers.items() if name.lower() not in _HOPS]
            async for piece in answer.content.iter_any():
                yield piece

    def __del__(self) -> None:  # (Ray calls it when the replica is to end)
        with suppress(Exception):
            self._ready.result()[0].terminate()


class Front:
    """What stands before the replicas.

    Args:
        replicas: Ray's handle of them.
    """

    def __init__(self, replicas: Any) -> None:
        self._replicas = replicas.options(stream=True)

    async def __call__(self, request: Request) -> Response:
        body = await request.body()
        path = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        headers = [(name, value) for name, value in request.headers.items() if name.lower() not in _HOPS]
        answer = self._replicas.remote(Forwarded(request.method, path, headers, body, beginning(body)))
        pieces = answer.__aiter__()
        status, said = await pieces.__anext__()
        response = StreamingResponse(_until_left(answer, pieces), status)
        response.raw_headers = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in said]
        return response


async def _until_left(answer: Any, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The pieces; where the client leaves before the last, the replica is told."""
    ended = False
    try:
        async for piece in pieces:
            yield piece
        ended = True
    finally:
        if not ended:
            answer.cancel()


def build(arguments: dict[str, str]) -> serve.Application:
    """What `serve run kbit.serve.ray_replicas:build NAME=VALUE...` runs.

    Args:
        arguments: models, flags: of `kbit serve`, as on its command line; replicas: how many (2); cpus: of each, for
            Ray's bookkeeping (1); gpus: of each (0); imbalance: see `PrefixRouter`.

    Raises:
        UsageError: another argument, or no number.
    """
    rest = dict(arguments)
    models, flags = shlex.split(rest.pop("models", "")), shlex.split(rest.pop("flags", ""))
    try:
        replicas, imbalance = int(rest.pop("replicas", "2")), int(rest.pop("imbalance", "8"))
        cpus, gpus = float(rest.pop("cpus", "1")), float(rest.pop("gpus", "0"))
    except ValueError as error:
        raise UsageError(f"replicas, cpus, gpus and imbalance are numbers: {error}") from None
    if rest or replicas < 1:
        wrong = ", ".join(rest) or "replicas"
        raise UsageError(f"{wrong}: use models, flags, replicas (1 or more), cpus, gpus, imbalance")
    router = RequestRouterConfig(request_router_class=PrefixRouter, request_router_kwargs={"imbalance": imbalance})
    replica = serve.deployment(
        Replica,
        name="kbit",
        num_replicas=replicas,
        max_ongoing_requests=1024,  # kbit serve has a queue of its own, with its own answer where it is full
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus, "runtime_env": {"env_vars": _environment()}},
        request_router_config=router,
    )
    front = serve.deployment(Front, name="front", max_ongoing_requests=4096, ray_actor_options={"num_cpus": 0})
    application: serve.Application = front.bind(replica.bind(models, flags))
    return application


def _environment() -> dict[str, str]:
    """What replicas are to see of this process's environment."""
    return {name: value for name, value in os.environ.items() if name.startswith("KBIT_") or name == "PYTHONPATH"}
