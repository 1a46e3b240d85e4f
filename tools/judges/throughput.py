"""`kbit serve` beside llama-server, in turns on one machine: tokens a second by clients, and what a long prompt does.

    python -m venv llama && llama/bin/pip install xllamacpp==2026.10.11549        # llama-server's code as a wheel
    python tools/judges/throughput.py qwen0.5b.gguf --llama llama/bin/python --clients 1,4,16,64 --tokens 32 --repeats 3

Both servers load the same GGUF file, run with the same threads and keep keys and values of the same number of tokens in
16 bits. Every client sends a prompt of its own and streams the answer at temperature 0. A repeat runs one server, then
the other, and the next begins with the other one, so that a busy machine slows both; the ratio is the median of the
pairs. Needs httpx.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import httpx
from load import prompt, stream

LLAMA = """
import sys, time
import xllamacpp
path, port, threads, tokens, seats = sys.argv[1], *map(int, sys.argv[2:])
params = xllamacpp.CommonParams()
params.model.path = path
params.port, params.n_ctx, params.n_parallel = port, tokens, seats
params.kv_unified = True
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
params.warmup = True
server = xllamacpp.Server(params)
print("ready", server.listening_address, flush=True)
time.sleep(1 << 30)
"""


async def one(client: httpx.AsyncClient, prompts: list[str], tokens: int, long: str | None) -> dict[str, float]:
    """Figures of one run of several clients."""
    begin = time.perf_counter()
    runs = [stream(client, each, tokens) for each in prompts]
    if long is not None:
        # The neighbour's prompt is being read when the others come.
        neighbour = asyncio.ensure_future(stream(client, long, 1))
        await asyncio.sleep(0.2)
    answers = await asyncio.gather(*runs)
    seconds = time.perf_counter() - begin
    if long is not None:
        await neighbour
    firsts = [times[1] - times[0] for times, _ in answers if len(times) > 1]
    gaps = sorted(b - a for times, _ in answers for a, b in itertools.pairwise(times[1:]))
    return {
        "tokens/s": sum(count or tokens for _, count in answers) / seconds,  # llama-server does not say how many
        "first token, slowest, ms": 1e3 * max(firsts),
        "between tokens, p99, ms": 1e3 * gaps[min(len(gaps) - 1, int(0.99 * len(gaps)))],
    }


async def compare(addresses: dict[str, str], flags: argparse.Namespace) -> None:
    """Runs all, and prints medians and ratios."""
    number = int(time.time()) % 100000 * 1000
    # A connection for every request: llama-server ends idle ones after five seconds, perhaps as they are used.
    limits = httpx.Limits(max_keepalive_connections=0)
    clients = {name: httpx.AsyncClient(base_url=url, timeout=900, limits=limits) for name, url in addresses.items()}
    cases = [(int(each), 0) for each in flags.clients.split(",")]
    if flags.long:
        cases.append((4, flags.long))
    print("| clients | figure | kbit | llama-server | ratio |\n|--|--|--|--|--|")
    for count, long in cases:
        found: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in clients}
        for repeat in range(flags.repeats):
            order = list(clients) if repeat % 2 == 0 else list(clients)[::-1]
            prompts = [prompt(number := number + 1, 30) for _ in range(count)]
            neighbour = prompt(number := number + 1, long) if long else None
            for name in order:
                for figure, value in (await one(clients[name], prompts, flags.tokens, neighbour)).items():
                    found[name][figure].append(value)
        for figure in found["kbit"]:
            ours, theirs = found["kbit"][figure], found["llama-server"][figure]
            ratio = statistics.median(a / max(b, 1e-9) for a, b in zip(ours, theirs, strict=True))
            who = f"{count}, beside a prompt of {long} words" if long else str(count)
            middle = f"{statistics.median(ours):.1f} | {statistics.median(theirs):.1f}"
            print(f"| {who} | {figure} | {middle} | {ratio:.2f} |", flush=True)


def wait(address: str, process: subprocess.Popen[bytes]) -> None:
    """Until a server is ready."""
    while True:
        if process.poll() is not None:
            sys.exit(f"the server at {address} ended with {process.returncode}")
        try:
            if httpx.get(f"{address}/health", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.2)


def main() -> None:
    """Starts both, measures, ends both."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--llama", required=True, help="a Python that has xllamacpp")
    parser.add_argument("--clients", default="1,4,16,64")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--long", type=int, default=0, help="words of a neighbour's long prompt, for a last row")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cache-tokens", type=int, default=16384)
    parser.add_argument("--port", type=int, default=8460)
    flags = parser.parse_args()
    addresses = {
        "kbit": f"http://127.0.0.1:{flags.port}",
        "llama-server": f"http://127.0.0.1:{flags.port + 1}",
    }
    ours = [sys.executable, "-m", "kbit", "serve", flags.model, "--port", str(flags.port)]
    numbers = [str(each) for each in (flags.port + 1, flags.threads, flags.cache_tokens, 64)]
    commands = [
        [*ours, "--threads", str(flags.threads), "--parallel", "64"],
        [flags.llama, "-c", LLAMA, flags.model, *numbers],
    ]
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / name for name in addresses]
        processes = []
        try:
            for command, log in zip(commands, logs, strict=True):
                processes.append(subprocess.Popen(command, stdout=log.open("wb"), stderr=subprocess.STDOUT))
            for address, process in zip(addresses.values(), processes, strict=True):
                wait(address, process)
            asyncio.run(compare(addresses, flags))
        except httpx.HTTPError:
            for log in logs:
                print(f"{log.name} said:", log.read_text(errors="replace")[-2000:], sep="\n")
            raise
        finally:
            for process in processes:
                process.kill()


if __name__ == "__main__":
    main()
