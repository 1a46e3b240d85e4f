"""Sends a running server a thousand mixed requests, many of them faulty, and checks every answer.

    kbit serve novels-2m/ --port 8433
    python tools/judges/mixed.py http://127.0.0.1:8433 --requests 1000 --clients 24 [--pid PID]

First each of some requests is answered alone; then they come at random, many at once, among them such as are no JSON,
too long, or of an unknown model, and such whose client leaves. An answer that is not what it was alone is wrong, one
that does not come is lost. With --pid (Linux) the process's memory is read before, in the middle and after.
Needs httpx.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

WORDS = [
    "night",
    "sea",
    "house",
    "old",
    "man",
    "said",
    "and",
    "the",
    "of",
    "a",
    "ship",
    "come",
    "was",
    "in",
    "had",
    "her",
]
TYPED = {"content-type": "application/json"}


def bodies(count: int, rng: random.Random) -> list[dict[str, Any]]:
    """Requests that have one right answer each."""
    beginning = " ".join(rng.choices(WORDS, k=70))
    made = []
    for index in range(count):
        prompt = " ".join(rng.choices(WORDS, k=rng.randint(1, 90)))
        made.append(
            {
                "prompt": f"{beginning} {prompt[:40]}" if index % 3 == 0 else prompt,
                "max_tokens": rng.randint(1, 60),
                "temperature": rng.choice([0, 0.7, 1.1]),
                "top_p": rng.choice([1, 0.9]),
                "seed": index,
                "n": rng.choice([1, 1, 1, 3]),
                "logprobs": rng.choice([None, 2]),
                "stop": rng.choice([None, ["the"]]),
            }
        )
    return made


async def whole(client: httpx.AsyncClient, body: dict[str, Any]) -> Any:
    """The choices of an answer."""
    response = await client.post("/v1/completions", json=body)
    response.raise_for_status()
    return response.json()["choices"]


async def streamed(client: httpx.AsyncClient, body: dict[str, Any], leave_after: int | None = None) -> list[str] | None:
    """The texts of a stream; None where the client left."""
    texts = [""] * body["n"]
    async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        response.raise_for_status()
        count, ended = 0, False
        async for line in response.aiter_lines():
            count += 1
            if leave_after is not None and count > leave_after:
                return None
            if line == "data: [DONE]":
                ended = True
            elif line.startswith("data: "):
                for choice in json.loads(line[6:])["choices"]:
                    texts[choice["index"]] += choice["text"]
        return texts if ended else []


async def one(client: httpx.AsyncClient, known: list[tuple[dict[str, Any], Any]], rng: random.Random) -> str:
    """One request of some kind; what came of it."""
    body, expected = rng.choice(known)
    kind = rng.choice(["whole"] * 4 + ["stream"] * 4 + ["leave", "no JSON", "too long", "unknown model", "impatient"])
    if kind == "whole":
        return kind if await whole(client, body) == expected else "WRONG"
    if kind == "stream":
        texts = await streamed(client, body)
        return kind if texts == [choice["text"] for choice in expected] else "LOST" if texts == [] else "WRONG"
    if kind == "leave":
        await streamed(client, {**body, "max_tokens": 60}, rng.randint(0, 9))
        return kind
    if kind == "impatient":
        try:
            await client.post("/v1/completions", json={**body, "n": 8}, timeout=rng.random() / 10)
        except httpx.TimeoutException:
            return kind
        return "answered before it could leave"
    wrong = {
        "no JSON": (b'{"prompt": ', 400),
        "too long": (json.dumps({**body, "prompt": "sea " * 20000}).encode(), 400),
        "unknown model": (json.dumps({**body, "model": "nobody"}).encode(), 404),
    }
    content, status = wrong[kind]
    response = await client.post("/v1/completions", content=content, headers=TYPED)
    return kind if response.status_code == status and response.json()["error"]["message"] else "WRONG"


def resident(pid: int | None) -> str:
    """Memory of a process, in words."""
    if pid is None:
        return ""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line for line in lines if line.startswith("VmRSS")).split(":")[1].strip()


async def main() -> int:
    """Sends them, counts, prints."""
    parser = argparse.ArgumentParser()
    parser.add_argument("address")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--pid", type=int)
    flags = parser.parse_args()
    rng, counts = random.Random(flags.seed), Counter[str]()
    limits = httpx.Limits(max_connections=flags.clients)
    async with httpx.AsyncClient(base_url=flags.address, timeout=600, limits=limits) as client:
        known = [(body, await whole(client, body)) for body in bodies(40, rng)]
        memory = [resident(flags.pid)]
        left = flags.requests

        async def work() -> None:
            nonlocal left
            while left > 0:
                left -= 1
                if left == flags.requests // 2:
                    memory.append(resident(flags.pid))
                try:
                    counts[await one(client, known, rng)] += 1
                except httpx.HTTPError as error:
                    counts[f"LOST ({type(error).__name__})"] += 1

        await asyncio.gather(*(work() for _ in range(flags.clients)))
        memory.append(resident(flags.pid))
        for _ in range(200):
            slots = (await client.get("/slots")).json()
            if not any(seat["requests"] for seat in slots):
                break
            await asyncio.sleep(0.05)
        held = sum(seat["requests"] for seat in slots if seat["id"] == 0)
    print(*(f"{count:5d} {kind}" for kind, count in sorted(counts.items())), f"{held:5d} still held", sep="\n")
    if flags.pid is not None:
        print("memory:", ", ".join(memory))
    return 1 if held or any(kind.startswith(("WRONG", "LOST")) for kind in counts) else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
