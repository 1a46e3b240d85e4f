"""Loads `kbit serve` for a while with all that clients do, and says what was lost, wrong or left behind.

    python tools/soak.py MODEL --minutes 60 --clients 8

Clients ask for answers whole and streamed, read slowly, leave in the middle, send bad JSON, wrong values and bodies
that are too large, and come back on new connections. Every answer is compared: with `kbit run` and the same seed for
some prompts, with the server's own first answer for the others. The server's resident memory is read every minute.
Prints a table; exit code 1 if an answer was wrong or lost, or memory grew by more than --growth from a quarter of the
time on. Linux. Needs httpx.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

PATIENCE = 120.0  # seconds: a request that takes longer is lost
BODY_LIMIT = 200_000  # of the server, so that a body beyond it is quickly made
STARTS = ("The old man", "It was", "In the morning the", "She said", "Once upon a time", "There was a house", "He had")


@dataclass(frozen=True)
class Ask:
    """A request whose answer is known, or will be after the first time."""

    prompt: str
    seed: int
    tokens: int
    temperature: float

    def body(self, **more: Any) -> dict[str, Any]:
        asked = {"prompt": self.prompt, "seed": self.seed, "max_tokens": self.tokens, "temperature": self.temperature}
        return {**asked, **more}


@dataclass
class Kind:
    """What came of one kind of request."""

    right: int = 0
    wrong: int = 0
    lost: int = 0
    seconds: list[float] = field(default_factory=list)
    examples: list[str] = field(default_factory=list)

    def count(self, problem: str | None, lost: bool, seconds: float) -> None:
        self.seconds.append(seconds)
        if problem is None:
            self.right += 1
            return
        self.lost, self.wrong = self.lost + lost, self.wrong + (not lost)
        if len(self.examples) < 3:
            self.examples.append(problem)


class Soak:
    """The clients of one server.

    Args:
        address: of the server.
        asks: what is asked for.
        known: answers by request; those of `kbit run`, to which the server's first ones are added.
    """

    def __init__(self, address: str, asks: list[Ask], known: dict[Ask, str]) -> None:
        self.address, self.asks, self.known = address, asks, known
        self.kinds: dict[str, Kind] = defaultdict(Kind)
        self.restarts = 0

    async def client(self, number: int, until: float) -> None:
        """One client: request after request, on a connection that it gives up now and then."""
        chance = random.Random(number)
        actions: list[tuple[int, str, Callable[..., Awaitable[str | None]]]] = [
            (30, "whole answer", self.whole), (25, "streamed answer", self.streamed), (8, "slow reader", self.slow),
            (12, "leaves midway", self.leaves), (8, "bad JSON", self.bad_json), (8, "wrong value", self.wrong_value),
            (5, "body too large", self.huge), (4, "no such route", self.lost_route),
        ]  # fmt: skip
        while time.monotonic() < until:
            async with httpx.AsyncClient(base_url=self.address, timeout=PATIENCE) as http:
                for _ in range(chance.randint(1, 20)):
                    if time.monotonic() >= until:
                        break
                    (_, name, act), begin = chance.choices(actions, [each[0] for each in actions])[0], time.monotonic()
                    problem, lost = None, False
                    try:
                        problem = await act(http, chance)
                    except httpx.HTTPError as error:
                        problem, lost = f"{type(error).__name__}: {error}", True
                    self.kinds[name].count(problem, lost, time.monotonic() - begin)
            self.restarts += 1

    def check(self, ask: Ask, text: str) -> str | None:
        expected = self.known.setdefault(ask, text)
        return None if text == expected else f"{ask}: {text!r} is not {expected!r}"

    async def whole(self, http: httpx.AsyncClient, chance: random.Random) -> str | None:
        ask = chance.choice(self.asks)
        response = await http.post("/v1/completions", json=ask.body())
        if response.status_code != 200:
            return f"{response.status_code}: {response.text[:200]}"
        return self.check(ask, response.json()["choices"][0]["text"])

    async def streamed(self, http: httpx.AsyncClient, chance: random.Random, pause: float = 0.0) -> str | None:
        ask, parts, last = chance.choice(self.asks), [], ""
        async with http.stream("POST", "/v1/completions", json=ask.body(stream=True)) as response:
            if response.status_code != 200:
                return f"{response.status_code}: {(await response.aread())[:200]!r}"
            async for line in response.aiter_lines():
                last = line or last
                if line.startswith("data: {"):
                    parts += [choice["text"] for choice in json.loads(line[6:])["choices"]]
                    await asyncio.sleep(pause)
        if last != "data: [DONE]":
            return f"{ask}: the stream ended with {last!r}"
        return self.check(ask, "".join(parts))

    async def slow(self, http: httpx.AsyncClient, chance: random.Random) -> str | None:
        return await self.streamed(http, chance, pause=0.05)

    async def leaves(self, http: httpx.AsyncClient, chance: random.Random) -> str | None:
        """Whatever it was promised, it goes after a few pieces."""
        body = chance.choice(self.asks).body(stream=True, n=chance.randint(1, 4))
        body |= {"max_tokens": 200, "ignore_eos": True}
        async with http.stream("POST", "/v1/completions", json=body) as response:
            left = chance.randint(0, 5)
            async for _ in response.aiter_lines():
                left -= 1
                if left < 0:
                    break
            return None if response.status_code == 200 else f"{response.status_code}"

    async def bad_json(self, http: httpx.AsyncClient, chance: random.Random) -> str | None:
        whole = json.dumps(self.asks[0].body()).encode()
        body = chance.choice([whole[:-2], b"", b"\xff\xfe", b"[" * 5000, b'{"prompt": NaN', b"null", whole + b"}"])
        response = await http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
        return self.refused(response, 400, 422)

    async def wrong_value(self, http: httpx.AsyncClient, chance: random.Random) -> str | None:
        changed = chance.choice([
            {"temperature": "hot"}, {"max_tokens": -1}, {"n": 10**9}, {"prompt": {"a": 1}}, {"top_p": 7},
            {"model": "no-such-model"}, {"prompt": "x " * 20_000},
        ])  # fmt: skip
        response = await http.post("/v1/completions", json=self.asks[0].body(**changed))
        return self.refused(response, 400, 404, 413, 422)

    async def huge(self, http: httpx.AsyncClient, chance: random.Random) -> str | None:
        """The server may answer, or close, before it has read it all."""
        body = self.asks[0].body(prompt="x" * (BODY_LIMIT + chance.randint(1, 4 * BODY_LIMIT)))
        try:
            return self.refused(await http.post("/v1/completions", json=body), 413)
        except (httpx.WriteError, httpx.RemoteProtocolError, httpx.ReadError):
            return None

    async def lost_route(self, http: httpx.AsyncClient, chance: random.Random) -> str | None:
        return self.refused(await http.get(f"/v1/{chance.random()}"), 404)

    @staticmethod
    def refused(response: httpx.Response, *statuses: int) -> str | None:
        """None where it is one of these, with an error object."""
        try:
            message = response.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = None
        right = response.status_code in statuses and isinstance(message, str)
        return None if right else f"{response.status_code}: {response.text[:200]}"


class Server:
    """`kbit serve` as a process, its messages read as they come."""

    def __init__(self, model: str, threads: int, cache: str) -> None:
        command = [sys.executable, "-m", "kbit", "serve", model, "--port", "0", "--threads", str(threads)]
        command += ["--max-body", str(BODY_LIMIT), "--cache-size", cache]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        self.said: list[str] = []
        for line in self.process.stderr:
            self.said.append(line)
            if "OPENAI_BASE_URL" in line:
                break
        found = re.search(r" at (http://\S+)", "".join(self.said))
        if found is None:
            raise SystemExit(f"soak.py: the server did not start: {''.join(self.said).strip()}")
        self.address = found[1]
        threading.Thread(target=self._drain, daemon=True).start()

    def _drain(self) -> None:
        assert self.process.stderr is not None
        self.said += self.process.stderr

    def memory(self) -> int:
        """Bytes of resident memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) * 1024

    def requests(self) -> int:
        """Requests that the server still has."""
        seats = httpx.get(f"{self.address}/slots", timeout=PATIENCE).json()
        return sum(seat["requests"] for seat in seats if seat["id"] == 0)


def answers_of_run(model: str, asks: list[Ask]) -> dict[Ask, str]:
    """What `kbit run` says to each."""
    found = {}
    for ask in asks:
        command = [
            sys.executable,
            "-m",
            "kbit",
            "run",
            "--raw",
            ask.prompt,
            "--model",
            model,
            "--json",
            "--threads",
            "1",
        ]
        command += ["--seed", str(ask.seed), "--temperature", str(ask.temperature), "--max-tokens", str(ask.tokens)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[ask] = str(json.loads(done.stdout)["text"])
    return found


def asks_for(count: int) -> list[Ask]:
    chance = random.Random(0)
    return [
        Ask(f"{chance.choice(STARTS)} {number}", number, chance.choice((8, 16, 48)), chance.choice((0.0, 0.7, 1.0)))
        for number in range(count)
    ]


async def load(soak: Soak, server: Server, clients: int, seconds: float, every: float) -> list[tuple[float, int]]:
    """Runs the clients; (seconds, bytes of memory) from time to time."""
    begin = time.monotonic()
    samples = [(0.0, server.memory())]
    running = [asyncio.create_task(soak.client(number, begin + seconds)) for number in range(clients)]
    while not all(task.done() for task in running):
        await asyncio.wait(running, timeout=every)
        if (code := server.process.poll()) is not None:
            raise SystemExit(f"soak.py: the server ended with code {code}: {''.join(server.said[-5:])}")
        samples.append((time.monotonic() - begin, server.memory()))
    await asyncio.gather(*running)
    return samples


def growth(samples: list[tuple[float, int]]) -> float:
    """The last sample over the first one from a quarter of the time on, less 1."""
    settled = next(nbytes for at, nbytes in samples if at >= samples[-1][0] / 4)
    return samples[-1][1] / settled - 1


def table(soak: Soak, samples: list[tuple[float, int]], left: int) -> str:
    lines = [f"{'request':16} {'right':>7} {'wrong':>6} {'lost':>6} {'p50 s':>8} {'p99 s':>8}"]
    for name, kind in sorted(soak.kinds.items()):
        ordered = sorted(kind.seconds)
        p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
        lines.append(
            f"{name:16} {kind.right:7} {kind.wrong:6} {kind.lost:6} {statistics.median(ordered):8.3f} {p99:8.3f}"
        )
        lines += [f"    {example}" for example in kind.examples]
    total = sum(kind.right + kind.wrong + kind.lost for kind in soak.kinds.values())
    whole = samples[-1][0]
    quarters = [min(samples, key=lambda each, at=part * whole / 4: abs(each[0] - at)) for part in range(5)]
    memory = ", ".join(f"{nbytes / 1e6:.1f} MB at {at:.0f} s" for at, nbytes in quarters)
    lines.append(f"{total} requests on {soak.restarts} connections; {left} left at the end")
    lines.append("resident memory, MB: " + " ".join(f"{nbytes / 1e6:.0f}" for _, nbytes in samples))
    lines.append(f"resident memory: {memory}; {growth(samples):+.1%} from a quarter of the time on")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1, help="of the server (default: 1)")
    parser.add_argument(
        "--cache-size",
        default="16MiB",
        help="of the server's keys and values (default: 16MiB): a large one fills for hours, and memory with it",
    )
    parser.add_argument("--prompts", type=int, default=24, help="different requests (default: 24)")
    parser.add_argument("--checked", type=int, default=8, help="of these, compared with kbit run (default: 8)")
    parser.add_argument("--every", type=float, default=60.0, help="seconds between looks at memory (default: 60)")
    parser.add_argument("--growth", type=float, default=0.02, help="of memory that is allowed (default: 0.02)")
    flags = parser.parse_args(arguments)
    asks = asks_for(flags.prompts)
    known = answers_of_run(flags.model, asks[: flags.checked])
    server = Server(flags.model, flags.threads, flags.cache_size)
    try:
        soak = Soak(server.address, asks, known)
        samples = asyncio.run(load(soak, server, flags.clients, 60 * flags.minutes, flags.every))
        deadline = time.monotonic() + PATIENCE
        while (left := server.requests()) and time.monotonic() < deadline:
            time.sleep(0.1)
        print(table(soak, samples, left))
    finally:
        server.process.kill()
        server.process.wait()
    bad = sum(kind.wrong + kind.lost for kind in soak.kinds.values())
    return 1 if bad or left or growth(samples) > flags.growth else 0


if __name__ == "__main__":
    sys.exit(main())
