"""What `kbit serve` takes besides the model: until it is ready, and for each token of one streamed chat.

    python tools/judges/overhead.py smollm2-135m-instruct qwen0.5b.gguf --repeats 3

Seconds of processors (user and system), which a busy machine changes less than the clock: of the whole process until
/health says 200, and of its threads during an answer. The first thread is the event loop's: HTTP, templates, tokenizer
and JSON; all others compute. Linux only: /proc tells.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

from kbit.serve.run import listen

PATIENCE = 600.0
MESSAGES = [{"role": "user", "content": "Tell me a long story about a river."}]


@contextmanager
def serving(model: str) -> Iterator[tuple[int, str, float]]:
    """(process, address, seconds by the clock until it was ready)."""
    (taken,) = listen("127.0.0.1", 0)
    port = taken.getsockname()[1]
    taken.close()
    begin = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "kbit", "serve", model, "--port", str(port), "--threads", "2"], stderr=subprocess.DEVNULL
    )
    address = f"http://127.0.0.1:{port}"
    try:
        while not ready(address):
            if process.poll() is not None:
                sys.exit(f"overhead.py: kbit serve {model} ended: start it by hand to see why")
            time.sleep(0.01)
        yield process.pid, address, time.perf_counter() - begin
    finally:
        process.terminate()
        process.wait()


def ready(address: str) -> bool:
    """Whether it can answer."""
    try:
        return bool(urlopen(f"{address}/health", timeout=PATIENCE).status == 200)
    except (URLError, OSError):
        return False


def seconds(process: int) -> tuple[float, float]:
    """(of the first thread, of all) that a process has taken of processors."""
    taken = {}
    for task in Path(f"/proc/{process}/task").iterdir():
        try:
            taken[task.name] = int((task / "schedstat").read_text().split()[0]) / 1e9
        except OSError:  # it has ended
            continue
    return taken[str(process)], sum(taken.values())


def answer(address: str, tokens: int) -> None:
    """Reads a streamed chat of so many tokens."""
    body = {"messages": MESSAGES, "max_tokens": tokens, "seed": 1, "ignore_eos": True, "stream": True}
    headers = {"Content-Type": "application/json"}
    request = Request(f"{address}/v1/chat/completions", json.dumps(body).encode(), headers)
    text = urlopen(request, timeout=PATIENCE).read().decode()
    assert text.endswith("data: [DONE]\n\n"), text[-200:]


def main() -> int:
    """Measures; prints a line for each start and for each answer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    for _ in range(given.repeats):  # models in turns
        for model in given.models:
            with serving(model) as (process, address, clock):
                _, start = seconds(process)
                print(f"{model}: ready after {start:.2f} s of processors, {clock:.2f} s by the clock", flush=True)
                answer(address, given.tokens)  # the first one warms up
                before = seconds(process)
                answer(address, given.tokens)
                loop, whole = (1e3 * (b - a) / given.tokens for a, b in zip(before, seconds(process), strict=True))
                print(
                    f"{model}: {loop:.2f} ms of {whole:.2f} a token ({loop / whole:.1%}) besides the model", flush=True
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
