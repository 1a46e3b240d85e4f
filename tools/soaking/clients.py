"""Clients of a server: what they ask for, how they behave, and what came of it."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx

PATIENCE = 120.0  # seconds: a request that takes longer is lost
BODY_LIMIT = 200_000  # of the server, so that a body beyond it is quickly made
STARTS = ("The old man", "It was", "In the morning the", "She said", "Once upon a time", "There was a house", "He had")

Choices = list[dict[str, Any]]  # of an answer, as the server tells them


@dataclass(frozen=True)
class Ask:
    """A request that has one right answer."""

    prompt: str
    seed: int
    max_tokens: int
    temperature: float
    top_p: float = 1.0
    n: int = 1
    stop: str | None = None
    logprobs: int | None = None

    def body(self, **more: Any) -> dict[str, Any]:
        """The request, with some values in place of others."""
        return {**asdict(self), **more}

    @property
    def is_plain(self) -> bool:
        """Whether `kbit run` has flags for all of it."""
        return (self.top_p, self.n, self.stop, self.logprobs) == (1.0, 1, None, None)


def asks_for(count: int) -> list[Ask]:
    """Requests that differ; the first half are plain."""
    chance = random.Random(0)
    asks = []
    for number in range(count):
        tokens, heat = chance.choice((8, 16, 48)), chance.choice((0.0, 0.7, 1.0))
        ask = Ask(f"{chance.choice(STARTS)} {number}", number, tokens, heat)
        if number >= count // 2:
            long = " ".join([ask.prompt, *(chance.choice(STARTS) for _ in range(chance.randint(0, 30)))])
            top_p, n = chance.choice((1.0, 0.9)), chance.choice((1, 1, 3))
            stop, logprobs = chance.choice((None, "the")), chance.choice((None, 2))
            ask = Ask(long, number, tokens, heat, top_p, n, stop, logprobs)
        asks.append(ask)
    return asks


@dataclass
class Kind:
    """What came of one kind of request."""

    right: int = 0
    wrong: int = 0
    lost: int = 0
    seconds: list[float] = field(default_factory=list)
    examples: list[str] = field(default_factory=list)

    def count(self, problem: str | None, lost: bool, seconds: float) -> None:
        """Adds a request; problem: what was wrong with it, or how it was lost."""
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
        known: what each request is answered when it comes alone.
        rate: requests a second that all clients together send at most, or None.
        most: requests in all, or None.
    """

    def __init__(
        self, address: str, known: dict[Ask, Choices], rate: float | None = None, most: int | None = None
    ) -> None:
        self.address, self.known, self.asks = address, known, list(known)
        self.kinds: dict[str, Kind] = defaultdict(Kind)
        self.connections = 0
        self._pause = 0.0 if rate is None else 1 / rate
        self._next, self._left = 0.0, most

    @property
    def bad(self) -> int:
        """Requests that were answered wrong, or not at all."""
        return sum(kind.wrong + kind.lost for kind in self.kinds.values())

    async def client(self, number: int, until: float) -> None:
        """One client: request after request, on a connection that it gives up now and then."""
        chance = random.Random(number)
        actions: list[tuple[int, str, Callable[..., Awaitable[str | None]]]] = [
            (28, "whole answer", self.whole), (24, "streamed answer", self.streamed), (8, "slow reader", self.slow),
            (11, "leaves midway", self.leaves), (4, "impatient", self.impatient), (8, "bad JSON", self.bad_json),
            (8, "wrong value", self.wrong_value), (5, "body too large", self.huge), (4, "no such route", self.no_route),
        ]  # fmt: skip
        over = False
        while not over:
            self.connections += 1
            async with httpx.AsyncClient(base_url=self.address, timeout=PATIENCE) as http:
                for _ in range(chance.randint(1, 20)):
                    if over := not await self.turn(until):
                        break
                    (_, name, act), begin = chance.choices(actions, [each[0] for each in actions])[0], time.monotonic()
                    problem, lost = None, False
                    try:
                        problem = await act(http, chance)
                    except httpx.HTTPError as error:
                        problem, lost = f"{type(error).__name__}: {error}", True
                    self.kinds[name].count(problem, lost, time.monotonic() - begin)

    async def turn(self, until: float) -> bool:
        """Waits until another request may go out; False: none may."""
        now = time.monotonic()
        at = max(now, self._next)
        if at >= until or self._left == 0:
            return False
        self._next = at + self._pause
        self._left = None if self._left is None else self._left - 1
        if at > now:
            await asyncio.sleep(at - now)
        return True

    async def whole(self, http: httpx.AsyncClient, chance: random.Random) -> str | None:
        """All of an answer, with its log-probabilities where they were asked for, is what it was alone."""
        ask = chance.choice(self.asks)
        response = await http.post("/v1/completions", json=ask.body())
        if response.status_code != 200:
            return f"{response.status_code}: {response.text[:200]}"
        choices, alone = response.json()["choices"], self.known[ask]
        return None if choices == alone else f"{ask}: {choices} is not {alone}"

    async def streamed(self, http: httpx.AsyncClient, chance: random.Random, pause: float = 0.0) -> str | None:
        """The texts of a stream are what they were alone."""
        ask, last = chance.choice(self.asks), ""
        texts = [""] * ask.n
        async with http.stream("POST", "/v1/completions", json=ask.body(stream=True)) as response:
            if response.status_code != 200:
                return f"{response.status_code}: {(await response.aread())[:200]!r}"
            async for line in response.aiter_lines():
                last = line or last
                if line.startswith("data: {"):
                    for choice in json.loads(line[6:])["choices"]:
                        texts[choice["index"]] += choice["text"]
                    await asyncio.sleep(pause)
        if last != "data: [DONE]":
            return f"{ask}: the stream ended with {last!r}"
        alone = [choice["text"] for choice in self.known[ask]]
        return None if texts == alone else f"{ask}: {texts} is not {alone}"

    async def slow(self, http: httpx.AsyncClient, chance: random.Random) -> str | None:
        """A stream that is read slowly."""
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

    async def impatient(self, http: httpx.AsyncClient, chance: random.Random) -> str | None:
        """It waits a moment for a whole answer, and goes."""
        body = chance.choice(self.asks).body(n=8)
        try:
            response = await http.post("/v1/completions", json=body, timeout=httpx.Timeout(PATIENCE, read=0.05))
        except httpx.ReadTimeout:
            return None
        return None if response.status_code == 200 else f"{response.status_code}"

    async def bad_json(self, http: httpx.AsyncClient, chance: random.Random) -> str | None:
        """What is no JSON, or not an object, is refused."""
        whole = json.dumps(self.asks[0].body()).encode()
        body = chance.choice([whole[:-2], b"", b"\xff\xfe", b"[" * 5000, b'{"prompt": NaN', b"null", whole + b"}"])
        response = await http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
        return self.refused(response, 400, 422)

    async def wrong_value(self, http: httpx.AsyncClient, chance: random.Random) -> str | None:
        """So are values that mean nothing, and a prompt beyond the context."""
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

    async def no_route(self, http: httpx.AsyncClient, chance: random.Random) -> str | None:
        """There is no such address."""
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
