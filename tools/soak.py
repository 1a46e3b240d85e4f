"""Loads `kbit serve` for a while with all that clients do, and says what was lost, wrong or left behind.

    python tools/soak.py MODEL --minutes 60 --rate 3 --clients 8
    python tools/soak.py MODEL --requests 1000 --clients 24

Clients ask for answers whole and streamed, read slowly, leave in the middle, send bad JSON, wrong values and bodies
that are too large, and come back on new connections. Every answer is compared with that to the same request alone, of
which some are compared with `kbit run` and the same seed. The server's resident memory is told every minute.
Prints a table; exit code 1 if an answer was wrong or lost, if the server kept a request, or if memory grew by more than
--growth from a quarter of the time on. Linux. Needs httpx.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
from soaking.clients import BODY_LIMIT, PATIENCE, Ask, Choices, Soak, asks_for

Samples = list[tuple[float, int]]  # seconds since the beginning, bytes of resident memory


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
        return sum(model["requests"] for model in httpx.get(f"{self.address}/slots", timeout=PATIENCE).json())


def alone(server: Server, asks: list[Ask]) -> dict[Ask, Choices]:
    """What each request is answered while there are no others."""
    found = {}
    with httpx.Client(base_url=server.address, timeout=PATIENCE) as http:
        for ask in asks:
            found[ask] = http.post("/v1/completions", json=ask.body()).raise_for_status().json()["choices"]
    return found


def text_of_run(model: str, ask: Ask) -> str:
    """What `kbit run` says."""
    command = [sys.executable, "-m", "kbit", "run", "--raw", ask.prompt, "--model", model, "--json", "--threads", "1"]
    command += ["--seed", str(ask.seed), "--temperature", str(ask.temperature), "--max-tokens", str(ask.max_tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return str(json.loads(done.stdout)["text"])


def compare_with_run(model: str, known: dict[Ask, Choices], count: int) -> int:
    """Compares answers to some plain requests; how many there were.

    Raises:
        SystemExit: one differs.
    """
    asks = [ask for ask in known if ask.is_plain][:count]
    for ask in asks:
        said, answered = text_of_run(model, ask), known[ask][0]["text"]
        if said != answered:
            raise SystemExit(f"soak.py: {ask}: the server says {answered!r}, and kbit run {said!r}")
    return len(asks)


async def load(soak: Soak, server: Server, clients: int, seconds: float, every: float) -> Samples:
    """Runs the clients; memory from time to time, as the median of sixty looks: a large request passes."""
    begin = time.monotonic()
    samples, looks = [(0.0, server.memory())], list[int]()
    running = [asyncio.create_task(soak.client(number, begin + seconds)) for number in range(clients)]
    while not all(task.done() for task in running):
        await asyncio.wait(running, timeout=every / 60)
        if (code := server.process.poll()) is not None:
            raise SystemExit(f"soak.py: the server ended with code {code}: {''.join(server.said[-5:])}")
        looks.append(server.memory())
        if len(looks) >= 60 or all(task.done() for task in running):
            samples.append((time.monotonic() - begin, int(statistics.median(looks))))
            looks.clear()
    await asyncio.gather(*running)
    return samples


def growth(samples: Samples) -> float:
    """The last sample over the first one from a quarter of the time on, less 1."""
    settled = next(nbytes for at, nbytes in samples if at >= samples[-1][0] / 4)
    return samples[-1][1] / settled - 1


def table(soak: Soak, samples: Samples, left: int) -> str:
    """What came of each kind of request, and of memory."""
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
    lines.append(f"{total} requests on {soak.connections} connections; {left} left at the end")
    lines.append("resident memory, MB: " + " ".join(f"{nbytes / 1e6:.0f}" for _, nbytes in samples))
    lines.append(f"resident memory: {memory}; {growth(samples):+.1%} from a quarter of the time on")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--minutes", type=float, default=60.0, help="at most (default: 60)")
    parser.add_argument("--requests", type=int, help="at most (default: as many as there is time for)")
    parser.add_argument("--rate", type=float, help="requests a second of all clients (default: as many as they can)")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1, help="of the server (default: 1)")
    parser.add_argument(
        "--cache-size",
        default="16MiB",
        help="of the server's keys and values (default: 16MiB): a large one fills for hours, and memory with it",
    )
    parser.add_argument("--prompts", type=int, default=200, help="different requests (default: 200)")
    parser.add_argument("--checked", type=int, default=8, help="of these, compared with kbit run (default: 8)")
    parser.add_argument("--every", type=float, default=60.0, help="seconds between figures of memory (default: 60)")
    parser.add_argument("--growth", type=float, default=0.02, help="of memory that is allowed (default: 0.02)")
    flags = parser.parse_args(arguments)
    server = Server(flags.model, flags.threads, flags.cache_size)
    try:
        known = alone(server, asks_for(flags.prompts))
        checked = compare_with_run(flags.model, known, flags.checked)
        soak = Soak(server.address, known, flags.rate, flags.requests)
        samples = asyncio.run(load(soak, server, flags.clients, 60 * flags.minutes, flags.every))
        deadline = time.monotonic() + PATIENCE
        while (left := server.requests()) and time.monotonic() < deadline:
            time.sleep(0.1)
        print(f"{len(known)} different requests; {checked} answers alone equal those of kbit run")
        print(table(soak, samples, left))
    finally:
        server.process.kill()
        server.process.wait()
    return 1 if soak.bad or left or growth(samples) > flags.growth else 0


if __name__ == "__main__":
    sys.exit(main())
