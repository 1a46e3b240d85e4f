"""Loads a running server and prints its speed: tokens a second by clients, and what a long prompt does to others.

    python tools/judges/load.py http://127.0.0.1:8080 --clients 1,4,16 --tokens 64 --repeats 3

Every client sends a prompt of its own and streams the answer, again when it has ended. Any server with /v1/completions
will do, so two of them can be compared in turns. Needs httpx.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import time

import httpx

TEXT = "The history of the sea is long, and those who sailed it wrote of what they saw. "


async def stream(client: httpx.AsyncClient, prompt: str, tokens: int) -> tuple[list[float], int]:
    """(when each piece of text came, tokens) of one request."""
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True, "ignore_eos": True}
    times, count = [time.perf_counter()], 0
    body["stream_options"] = {"include_usage": True}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                each = json.loads(line[6:])
                if each["choices"]:
                    times.append(time.perf_counter())
                if each.get("usage"):
                    count = each["usage"]["completion_tokens"]
    return times, count


def prompt(number: int, words: int) -> str:
    """A text that no other request begins with."""
    text = TEXT.split()
    return f"Part {number}. " + " ".join(text[(number + i) % len(text)] for i in range(words))


async def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser()
    parser.add_argument("address")
    parser.add_argument("--clients", default="1,4,16")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--long", type=int, default=0, help="words of a neighbour's long prompt")
    flags = parser.parse_args()
    number = int(time.time()) % 100000 * 100
    async with httpx.AsyncClient(base_url=flags.address, timeout=600) as client:
        await stream(client, prompt(number, 20), 8)
        for clients in map(int, flags.clients.split(",")):
            speeds, firsts, gaps = [], [], []
            for _ in range(flags.repeats):
                begin = time.perf_counter()
                prompts = [prompt(number := number + 1, 30) for _ in range(clients)]
                runs = [stream(client, each, flags.tokens) for each in prompts]
                if flags.long:
                    runs.append(stream(client, prompt(number := number + 1, flags.long), 1))
                answers = await asyncio.gather(*runs)
                seconds = time.perf_counter() - begin
                speeds.append(sum(count for _, count in answers) / seconds)
                for times, _ in answers[:clients]:
                    firsts.append(times[1] - times[0])
                    gaps += [b - a for a, b in itertools.pairwise(times[1:])]
            gaps.sort()
            first, between = 1e3 * statistics.median(firsts), 1e3 * statistics.median(gaps)
            worst = 1e3 * gaps[min(len(gaps) - 1, int(0.99 * len(gaps)))]
            print(
                f"{clients:3d} clients: {statistics.median(speeds):7.1f} tokens/s (of {flags.repeats} runs), first "
                f"token {first:6.0f} ms, between tokens {between:6.1f} ms, p99 {worst:6.1f} ms"
            )


if __name__ == "__main__":
    asyncio.run(main())
