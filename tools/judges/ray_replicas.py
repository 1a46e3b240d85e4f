"""Two replicas of `kbit serve` on this machine by Ray, asked what one server is asked.

    python tools/judges/ray_replicas.py MODEL

Needs ray[serve]. Looked at: the same answers as from `kbit serve` alone, streamed ones too; prompts that begin alike
meet the pages that the first of them left; many at once are all answered; a bad body and an unknown route are answered
as by the server; a replica whose server is killed is replaced. Exit code 1: one of these does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import aiohttp
import ray
from ray import serve

from kbit.serve.ray_replicas import build

# A beginning of more than one block of `kbit.serve.prefixes`, and within the context of small models.
BEGINNING = "It was a bright cold day, and the old clock on the stairs struck one. " * 6
TOKENS = 16


def asked(number: int, stream: bool = False) -> dict[str, Any]:
    """A request, of which several have one beginning."""
    prompt = f"{BEGINNING}Chapter {number}. She said"
    return {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0.8, "seed": number, "stream": stream}


async def post(session: aiohttp.ClientSession, body: dict[str, Any] | bytes) -> tuple[int, str]:
    """Status and text of an answer."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with session.post("/v1/completions", data=data, headers={"content-type": "application/json"}) as answer:
        return answer.status, await answer.text()


def text_of(answer: tuple[int, str]) -> str:
    """What the model wrote."""
    status, body = answer
    if status != 200:
        return f"{status}: {body}"
    if not body.startswith("data:"):
        return str(json.loads(body)["choices"][0]["text"])
    rows = [json.loads(row[6:]) for row in body.split("\n\n") if row.startswith("data: {")]
    return "".join(choice["text"] for row in rows for choice in row["choices"])


def servers() -> list[int]:
    """Process numbers of the replicas' servers."""
    listing = subprocess.run(["ps", "-eo", "pid,args"], stdout=subprocess.PIPE, text=True, check=True).stdout
    found = re.findall(r"^ *(\d+) \S*python\S* -m kbit serve .*--host 127.0.0.1 --port 0 --threads 1$", listing, re.M)
    return [int(number) for number in found]


async def alone(model: str, count: int) -> list[str]:
    """The answers of one server."""
    command = [sys.executable, "-m", "kbit", "serve", model, "--port", "0", "--threads", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        address = next(found[0] for line in process.stderr if (found := re.search(r"http://[\d.]+:\d+", line)))
        async with aiohttp.ClientSession(address) as session:
            return [text_of(await post(session, asked(number))) for number in range(count)]
    finally:
        process.terminate()
        process.wait()


async def judge(address: str, expected: list[str], say: Callable[[str, bool], None]) -> None:
    """Everything that is asked of the replicas."""
    count = len(expected)
    async with aiohttp.ClientSession(address, timeout=aiohttp.ClientTimeout(total=600)) as session:
        while (await session.get("/health")).status != 200:
            await asyncio.sleep(0.5)
        first = [text_of(await post(session, asked(number))) for number in range(count)]
        say(f"{count} answers one after another equal those of one server", first == expected)
        streamed = await asyncio.gather(*(post(session, asked(number, stream=True)) for number in range(count)))
        say(f"{count} streamed at once, too", [text_of(each) for each in streamed] == expected)
        again = [json.loads((await post(session, asked(number)))[1])["usage"] for number in range(count)]
        cached = [usage["prompt_tokens_details"]["cached_tokens"] for usage in again]
        say(f"prompts that begin alike find {min(cached)} to {max(cached)} tokens computed", min(cached) > 0)
        many = await asyncio.gather(*(post(session, {**asked(n % count), "max_tokens": 64}) for n in range(64)))
        say("64 at once are all answered", all(status == 200 for status, _ in many))
        status, body = await post(session, b"{")
        say("a body that is no JSON: 400, in the server's words", (status, "invalid_json" in body) == (400, True))
        async with session.get("/nothing") as answer:
            say("an unknown route: 404", answer.status == 404)
        before = servers()
        os.kill(before[0], signal.SIGKILL)
        until = time.time() + 180
        while time.time() < until and len(set(servers()) - {before[0]}) < len(before):
            await asyncio.sleep(1)
        say("a server that was killed is replaced", len(set(servers()) - {before[0]}) == len(before))
        say("answers after that are the same", text_of(await post(session, asked(0))) == expected[0])


def main() -> int:
    """Prints a line for each thing looked at."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=os.path.abspath, help="a folder or file")
    arguments = parser.parse_args()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anyone
    missed = []

    def say(what: str, holds: bool) -> None:
        missed.extend([] if holds else [what])
        print(f"{'holds' if holds else 'MISSED'}: {what}", flush=True)

    expected = asyncio.run(alone(arguments.model, 6))
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": 8123})
    try:
        serve.run(build({"models": arguments.model, "replicas": "2", "flags": "--threads 1"}))
        asyncio.run(judge("http://127.0.0.1:8123", expected, say))
    finally:
        serve.shutdown()
        ray.shutdown()
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
