"""Models that no cache holds, beside llama.cpp: Qwen2.5-Coder of 0.5 and 1.5 billion weights, 8 billion random ones.

    KBIT_MODELS=~/models pytest benchmarks/test_models.py -s                  # of `pytest benchmarks/` with --full only
    KBIT_MODELS=~/models pytest benchmarks/test_models.py -s -k "qwen1.5b and decode"

Decoding reads every weight once per step: `GB/s` is what that comes to, `share` that over the bandwidth that as many
threads read with in the same rounds. A prompt is multiplied: `GFLOP/s` counts two operations per token and weight of
the layers, `share of product` is that over torch's product of 512 tokens. Times of starting are of whole commands,
files in the page cache; memory counts each page once, also where two processes share it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from large_models import GGUFS, SYNTHETIC, LargeModel, find
from limits import PRODUCT_TOKENS, product_rate, read_bandwidth
from measuring import ROUNDS, Contestant, report, take_turns, thread_counts
from memory_use import most_memory, time_command
from peers import RUNNERS, MissingPeer, Peers, Worker

pytestmark = pytest.mark.full  # not of a plain `pytest benchmarks/`

DECODE, PROMPT, BATCH = 32, PRODUCT_TOKENS, 8  # tokens, tokens, sequences
THREADS = thread_counts()[-1]
TEXT = "The capital of France is"
SHOWN = {"bits_per_weight": ".2f", "GB/s": ".2f", "share": ".0%"}


@pytest.fixture(scope="session")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Path]]:
    """A folder for what is made on the spot, emptied at the end: pytest would keep it for three runs."""
    import shutil

    made: list[Path] = []

    def folder() -> Path:
        if not made:
            made.append(tmp_path_factory.mktemp("models"))
        return made[0]

    yield folder
    for path in made:
        shutil.rmtree(path)


@pytest.fixture(params=[*GGUFS, SYNTHETIC])
def model(request: pytest.FixtureRequest, scratch: Callable[[], Path]) -> LargeModel:
    return find(request.param, scratch)


class Sides:
    """Who takes part: kbit at 4 bits, kbit and llama.cpp on the GGUF file as it is, llama.cpp on Q4_0."""

    def __init__(self, stack: ExitStack, model: LargeModel) -> None:
        self.stack, self.model = stack, model
        self.peers = Peers()
        self.contestants: list[Contestant] = []
        self.missing: list[str] = []

    def worker(self, command: list[object]) -> Worker:
        return self.stack.enter_context(Worker([sys.executable, *command, "--threads", THREADS]))

    def files(self) -> list[tuple[str, Path]]:
        """What kbit runs: name and path."""
        as_is = [("GGUF as it is", self.model.gguf)] if self.model.gguf is not None else []
        return [("4 bits", self.model.quantized), *as_is]

    def ggufs(self) -> list[tuple[str, Path]]:
        """What llama.cpp runs; notes what is missing."""
        if self.model.gguf is None:
            return []
        try:
            self.peers.tool("llama-bench")
            return [("4 bits", self.peers.requantized(self.model.gguf, "Q4_0")), ("GGUF as it is", self.model.gguf)]
        except MissingPeer as missing:
            self.missing.append(str(missing))
            return []

    def add(self, engine: str, name: str, measure: Callable[[], float], group: str, **about: Any) -> Contestant:
        self.contestants.append(Contestant(engine, f"{engine} {name}", measure, about, group))
        return self.contestants[-1]

    def kbit(self, do: str, sequences: int = 1, **arguments: Any) -> None:
        """A process per file; in a second call, the same."""
        for name, path in self.files():
            worker = self.worker([RUNNERS / "kbit_runner.py", path])
            self.add(
                "kbit", name, lambda w=worker: w.rate(do, **arguments), name, **self.sizes(worker.ready, sequences)
            )

    def llama(self, *options: str, sequences: int = 1) -> None:
        for name, path in self.ggufs():
            about: dict[str, Any] = {}

            def measure(path: Path = path, about: dict[str, Any] = about) -> float:
                result = self.peers.llama_bench(path, THREADS, *options, "-r", "1")
                size = result["model_size"]
                about.update(self.sizes({"bytes_per_token": size, "weights_bytes": size}, sequences))
                return float(result["avg_ts"])

            label = f"{name} (Q4_0)" if name == "4 bits" else name
            self.contestants.append(Contestant("llama.cpp", f"llama.cpp {label}", measure, about, name))

    def sizes(self, ready: dict[str, Any], sequences: int) -> dict[str, Any]:
        """What a report says of a side: bytes of a step, and the tokens that it yields."""
        return {
            "bytes_per_token": ready["bytes_per_token"],
            "bits_per_weight": 8 * ready["weights_bytes"] / self.model.weights,
            "sequences": sequences,
        }

    def with_shares(self, memory: Contestant) -> None:
        """Adds to every side the rate at which it reads its weights."""
        for side in self.contestants:
            about = side.about
            about["GB/s"] = side.median / about["sequences"] * about["bytes_per_token"] / 1e9
            about["share"] = about["GB/s"] / memory.median


@pytest.fixture
def sides(model: LargeModel) -> Iterator[Sides]:
    with ExitStack() as stack:
        yield Sides(stack, model)


def test_decode(benchmark: Any, sides: Sides) -> None:
    """Tokens per second after an empty context, batch 1."""
    sides.kbit("decode", tokens=DECODE)
    sides.llama("-p", "0", "-n", str(DECODE))
    memory = read_bandwidth(sides.worker([RUNNERS / "layer_runner.py"]))
    take_turns(benchmark, [*sides.contestants, memory], rounds=min(ROUNDS, 3))
    sides.with_shares(memory)
    tell(benchmark, "decode", sides, controls=[memory], columns=SHOWN, goal="90 % of the bandwidth")


def test_batch(benchmark: Any, sides: Sides) -> None:
    """Eight sequences decoded at once against one, at 4 bits."""
    worker = sides.worker([RUNNERS / "kbit_runner.py", sides.model.quantized])
    for batch in (1, BATCH):
        about = sides.sizes(worker.ready, batch)
        rate = lambda batch=batch: worker.rate("decode", tokens=DECODE, batch=batch)  # noqa: E731
        sides.add("kbit", f"4 bits, batch {batch}", rate, f"batch {batch}", **about)
    gguf = dict(sides.ggufs()).get("4 bits")
    if gguf is not None:
        for batch in (1, BATCH):
            rate = lambda batch=batch: sides.peers.llama_batched_bench(gguf, THREADS, [batch], DECODE)[batch]  # noqa: E731
            size = gguf.stat().st_size
            about = sides.sizes({"bytes_per_token": size, "weights_bytes": size}, batch)
            sides.add("llama.cpp", f"Q4_0, batch {batch}", rate, f"batch {batch}", **about)
    memory = read_bandwidth(sides.worker([RUNNERS / "layer_runner.py"]))
    take_turns(benchmark, [*sides.contestants, memory], rounds=min(ROUNDS, 3))
    sides.with_shares(memory)
    pairs = zip(sides.contestants[::2], sides.contestants[1::2], strict=True)
    gain = ", ".join(f"{one.engine} {many.median / one.median:.2f}x" for one, many in pairs)
    tell(
        benchmark, "batch decode", sides, controls=[memory], columns=SHOWN, goal=f"batch {BATCH} 4x batch 1", gain=gain
    )


def test_prefill(benchmark: Any, sides: Sides) -> None:
    """Tokens per second of a prompt of 512."""
    sides.kbit("prefill", sequences=PROMPT, tokens=PROMPT)
    sides.llama("-p", str(PROMPT), "-n", "0", sequences=PROMPT)
    torch = sides.worker([RUNNERS / "layer_runner.py"])
    memory, product = read_bandwidth(torch), product_rate(torch)
    take_turns(benchmark, [*sides.contestants, memory, product], rounds=min(ROUNDS, 3))
    sides.with_shares(memory)
    for side in sides.contestants:
        side.about["GFLOP/s"] = 2 * side.median * sides.model.linear_weights / 1e9
        side.about["share_of_product"] = side.about["GFLOP/s"] / product.median
    columns = {**SHOWN, "GFLOP/s": ".0f", "share_of_product": ".0%"}
    tell(benchmark, "prefill", sides, controls=[memory, product], columns=columns, goal="1.6x the peers", prompt=PROMPT)


def test_start(benchmark: Any, sides: Sides) -> None:
    """Seconds of `kbit run` with one token, the whole command, files in the page cache."""
    for name, path in sides.files():
        about: dict[str, Any] = {}

        def measure(path: Path = path, about: dict[str, Any] = about) -> float:
            took = time_command([*run_command(path, 1), "--json"])
            about.update(cpu_seconds=took.cpu_seconds, load_seconds=json.loads(took.output)["load_s"])
            return took.seconds

        sides.contestants.append(Contestant("kbit", f"kbit {name}", measure, about, name))
    for name, gguf in sides.ggufs():
        first = lambda gguf=gguf: sides.peers.llama_first_token(gguf, THREADS, TEXT)["process"]  # noqa: E731
        sides.add("llama.cpp", name, first, name)
    take_turns(benchmark, sides.contestants, rounds=min(ROUNDS, 3))
    columns = {"cpu_seconds": ".2f", "load_seconds": ".2f"}
    goal = "1.2 GB in 0.7 s, 4.6 GB in 1.5 s"
    tell(benchmark, "start to first token", sides, unit="seconds", columns=columns, goal=goal, higher_is_better=False)


def test_memory(benchmark: Any, sides: Sides) -> None:
    """MB beyond the weights that `kbit run` takes; and that two of them take, who should share the weights."""
    if not Path("/proc/self/smaps_rollup").exists():
        pytest.skip("the system does not tell what memory processes share (Linux does: /proc/PID/smaps_rollup)")
    for name, path in sides.files():
        with Worker([sys.executable, RUNNERS / "kbit_runner.py", path, "--threads", THREADS]) as worker:
            weights = worker.ready["weights_bytes"]
        for count, group in ((1, "one process"), (2, "two processes")):
            command = run_command(path, DECODE)
            beyond = lambda command=command, count=count, w=weights: (most_memory([command] * count) - w) / 1e6  # noqa: E731
            sides.add("kbit", f"{name}, {group}", beyond, f"{name}, {group}", weights_MB=weights / 1e6)
    for name, gguf in sides.ggufs():
        size = gguf.stat().st_size
        beyond = lambda gguf=gguf, size=size: (sides.peers.llama_memory(gguf, THREADS, 8, DECODE) - size) / 1e6  # noqa: E731
        sides.add("llama.cpp", f"{name}, one process", beyond, f"{name}, one process", weights_MB=size / 1e6)
    take_turns(benchmark, sides.contestants, rounds=1, warm_up=False)
    columns = {"weights_MB": ".0f"}
    goal = "120 MB a process"
    tell(benchmark, "memory", sides, unit="MB beyond the weights", columns=columns, goal=goal, higher_is_better=False)


def run_command(model: Path, tokens: int) -> list[object]:
    options = ["--model", model, "--max-tokens", tokens, "--threads", THREADS]
    return [sys.executable, "-m", "kbit.cli.main", "run", "--raw", TEXT, *options]


def tell(benchmark: Any, case: str, sides: Sides, *, unit: str = "tokens/s", **about: Any) -> None:
    """The report of a case."""
    missing, name = sides.missing, sides.model.name
    report(benchmark, case, unit, sides.contestants, missing=missing, model=name, threads=THREADS, **about)
