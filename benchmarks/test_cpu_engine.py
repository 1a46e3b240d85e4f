"""The CPU engine beside llama.cpp, OpenVINO GenAI and onnxruntime-genai: same machine, model and threads, in turns.

    python tools/peers/install.py                                                  # once
    pytest benchmarks/test_cpu_engine.py -s --benchmark-json results.json          # about half an hour on 2 cores
    pytest benchmarks/test_cpu_engine.py -s -k "decode and 4bit"                   # one of them
    python benchmarks/cpu_figure.py results.json -o docs/cpu.svg

Every engine runs in a process of its own, which is stopped while it is not its turn; a round asks each of them once,
A B C, C B A, ..., and what is reported is medians over rounds with the spread. `pytest benchmarks/` runs the 4-bit
cases on all cores, `--full` all of it. KBIT_BENCH_ROUNDS (5) and
KBIT_BENCH_THREADS ("1,2"; one and all cores) change how much is measured. Nothing is asserted about time. A peer that
is not installed is named in the report, with the command that installs it.

`share_of_limit` is tokens/s times bytes of weights read per token, over the read bandwidth measured in the same rounds.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
from measuring import ROUNDS, Contestant, machine, report, take_out, take_turns, thread_counts
from peers import RUNNERS, MissingPeer, Peers, Worker, busy_process

PROMPT, DECODE, DEPTH, BATCH = 512, 128, 4096, 8  # tokens, tokens, tokens, sequences
FIRST_PROMPT = "The capital of France is"
LLAMA = {2: "Q2_K", 3: "Q3_K_M", 4: "Q4_0", 8: "Q8_0"}
WEIGHTS = 134_515_008  # of the default model, its tied head counted once: for bits per weight
ALL = thread_counts()[-1]
ALLOWANCE = 350e6  # bytes that kbit may take beside weights and KV cache, torch included

# Of a plain `pytest benchmarks/`: 4 bits on all cores.
SHORT_BITS = 4
by_bits = pytest.mark.parametrize("bits", LLAMA, ids=[f"{bits}bit" for bits in LLAMA])
by_bits_and_threads = pytest.mark.parametrize(
    ("bits", "threads"),
    [
        pytest.param(
            bits,
            threads,
            id=f"{bits}bit-{threads}threads",
            marks=() if (bits, threads) == (SHORT_BITS, ALL) else pytest.mark.full,
        )
        for bits in LLAMA
        for threads in thread_counts()
    ],
)


class Field:
    """The contestants of one comparison, and the processes they run in."""

    def __init__(self, stack: ExitStack, models: Callable[..., Path]) -> None:
        self.peers = Peers()
        self.contestants: list[Contestant] = []
        self.missing: list[str] = []
        self._stack, self._models = stack, models

    def worker(self, worker: Worker) -> Worker:
        return self._stack.enter_context(worker)

    def kbit(self, bits: int, threads: int, *options: object, head: int | None = None, **env: str) -> Worker:
        """A kbit process with the default model at `bits` bits, embedding and head at `head` bits (the same)."""
        command = [sys.executable, RUNNERS / "kbit_runner.py", self._models(bits, head or bits), "--threads", threads]
        return self.worker(Worker([*command, *options], env))

    def add(self, engine: str, name: str, measure: Callable[[], float], group: str = "", **about: Any) -> None:
        self.contestants.append(Contestant(engine, f"{engine} {name}", measure, about, group))

    def add_kbit(self, name: str, worker: Worker, do: str, group: str = "", **arguments: Any) -> None:
        about = {**weights_of(worker.ready), "backend": worker.ready["backend"]}
        self.add("kbit", name, lambda: worker.rate(do, **arguments), group, **about)

    def add_llama(
        self, gguf: str, threads: int, *options: str, name: str = "", group: str = "", variant: str = "native"
    ) -> None:
        about: dict[str, Any] = {"version": self.peers.version("llama.cpp")}

        def measure() -> float:
            result = self.peers.llama_bench(gguf, threads, *options, "-r", "1", variant=variant)
            about.update(weights_of({"bytes_per_token": result["model_size"], "weights_bytes": result["model_size"]}))
            return float(result["avg_ts"])

        def build() -> None:
            self.peers.tool("llama-bench", variant)
            self.peers.gguf(gguf)
            self.contestants.append(Contestant("llama.cpp", f"llama.cpp {gguf}{name}", measure, about, group))

        self.optional(build)

    def add_others(self, bits: int, threads: int, do: str, **arguments: Any) -> None:
        """OpenVINO GenAI and onnxruntime-genai, where they have a model of this width."""

        def openvino() -> None:
            worker = self.worker(self.peers.openvino(LLAMA[bits], threads))
            self.add("OpenVINO", LLAMA[bits], lambda: worker.rate(do, **arguments), backend=worker.ready["backend"])

        def onnxruntime() -> None:
            worker = self.worker(self.peers.onnxruntime(bits, threads))
            self.add("onnxruntime", f"int{bits}", lambda: worker.rate(do, **arguments), backend=worker.ready["backend"])

        if bits in (4, 8):  # neither runs 2 or 3 bits: OpenVINO reads Q4_0, Q4_K, Q6_K, Q8_0 and F16 only
            self.optional(openvino)
            self.optional(onnxruntime)

    def add_bandwidth(self, threads: int) -> None:
        """The machine's read bandwidth, taken in the same rounds (GB/s)."""
        worker = self.worker(Worker([sys.executable, RUNNERS / "layer_runner.py", "--threads", threads]))
        self.add("memory", "read GB/s", lambda: worker.ask("bandwidth", seconds=0.3)["bytes_per_second"] / 1e9)

    def optional(self, build: Callable[[], None]) -> None:
        try:
            build()
        except MissingPeer as missing:
            self.missing.append(str(missing))

    def share_of_limit(self) -> Contestant:
        """The read bandwidth, taken out of the contestants; each of them gets its share of the limit it sets."""
        memory = take_out(self.contestants, "memory")
        for contestant in self.contestants:
            read = contestant.about.get("bytes_per_token")
            if read is not None:
                contestant.about["share_of_limit"] = contestant.median * read / (memory.median * 1e9)
        return memory


def weights_of(ready: dict[str, Any]) -> dict[str, Any]:
    """Bytes read per token, and bits per weight of the whole model as it lies in memory."""
    return {
        "bytes_per_token": ready["bytes_per_token"],
        "bits_per_weight": ready["weights_bytes"] * 8 / WEIGHTS,
    }


@pytest.fixture
def field(converted: Callable[..., Path]) -> Iterator[Field]:
    with ExitStack() as stack:
        yield Field(stack, converted)


@by_bits_and_threads
def test_decode(benchmark: Any, field: Field, bits: int, threads: int) -> None:
    """Tokens per second after an empty context, batch 1."""
    for head in (bits,) if bits == 8 else (bits, 8):
        worker = field.kbit(bits, threads, head=head)
        field.add_kbit(f"{bits} bits, head {head}", worker, "decode", tokens=DECODE)
    for gguf in (LLAMA[bits], *(("Q4_0-pure",) if bits == 4 else ())):
        field.add_llama(gguf, threads, "-p", "0", "-n", str(DECODE))
    field.add_others(bits, threads, "decode", tokens=DECODE)
    field.add_bandwidth(threads)
    take_turns(benchmark, field.contestants)
    memory = field.share_of_limit()
    report(
        benchmark,
        "decode",
        "tokens/s",
        field.contestants,
        missing=field.missing,
        goal=f"{1.5 if threads > 1 else 1.25}x llama.cpp {LLAMA[bits]}, and 85 % of the limit",
        columns={"bits_per_weight": ".2f", "share_of_limit": ".0%"},
        controls=[memory],
        bits=bits,
        threads=threads,
        read_bandwidth_GB_per_s=memory.median,
    )


@by_bits_and_threads
def test_prefill(benchmark: Any, field: Field, bits: int, threads: int) -> None:
    """Tokens per second of a prompt of 512; where the CPU has AMX, once more without it on both sides."""
    worker = field.kbit(bits, threads)
    field.add_kbit(f"{bits} bits", worker, "prefill", tokens=PROMPT)
    options = ("-p", str(PROMPT), "-n", "0")
    field.add_llama(LLAMA[bits], threads, *options)
    if "amx_int8" in machine()["isa"]:
        without = field.kbit(bits, threads, KBIT_CPU_ISA="avx512bf16")
        field.add_kbit(f"{bits} bits, no AMX", without, "prefill", group="no AMX", tokens=PROMPT)
        field.add_llama(LLAMA[bits], threads, *options, name=", no AMX", group="no AMX", variant="no-amx")
    field.add_others(bits, threads, "prefill", tokens=PROMPT)
    take_turns(benchmark, field.contestants)
    report(
        benchmark,
        "prefill",
        "tokens/s",
        field.contestants,
        missing=field.missing,
        goal="3x llama.cpp and 2x OpenVINO GenAI with AMX; 2x llama.cpp without",
        bits=bits,
        threads=threads,
        prompt=PROMPT,
    )


@pytest.mark.full
def test_decode_in_long_context(benchmark: Any, field: Field) -> None:
    """Decoding behind 4096 tokens, 4-bit weights: 4-bit keys and values on both sides, and 16-bit ones."""
    threads, tokens = ALL, 32
    options = ("-p", "0", "-n", str(tokens), "-d", str(DEPTH), "-fa", "1")
    for kv, kind in ((4, "q4_0"), (16, "f16")):
        worker, group = field.kbit(4, threads, "--kv-bits", kv), f"{kv}-bit KV"
        field.add_kbit(f"4 bits, {group}", worker, "decode", group, tokens=tokens, depth=DEPTH)
        field.add_llama("Q4_0", threads, *options, "-ctk", kind, "-ctv", kind, name=f", {kind} KV", group=group)
    # Every process of llama.cpp fills the context anew, which takes it a minute with 4-bit keys and values.
    take_turns(benchmark, field.contestants, rounds=min(ROUNDS, 3), warm_up=False)
    report(
        benchmark,
        "decode in long context",
        "tokens/s",
        field.contestants,
        missing=field.missing,
        goal="1.5x llama.cpp with q4_0 KV",
        threads=threads,
        depth=DEPTH,
    )


@pytest.mark.full
def test_batch(benchmark: Any, field: Field) -> None:
    """Eight sequences decoded at once against one."""
    threads = ALL
    worker = field.kbit(4, threads)
    for batch in (1, BATCH):
        field.add_kbit(f"4 bits, batch {batch}", worker, "decode", f"batch {batch}", tokens=64, batch=batch)

    def llama() -> None:
        field.peers.tool("llama-batched-bench")
        field.peers.gguf("Q4_0")
        for batch in (1, BATCH):
            field.add(
                "llama.cpp",
                f"Q4_0, batch {batch}",
                lambda batch=batch: field.peers.llama_batched_bench("Q4_0", threads, [batch], 64)[batch],
                f"batch {batch}",
            )

    field.optional(llama)
    take_turns(benchmark, field.contestants)
    gains = {one.engine: many.median / one.median for one, many in pairs(field.contestants)}
    report(
        benchmark,
        "batch decode",
        "tokens/s in all",
        field.contestants,
        missing=field.missing,
        goal=f"kbit's batch {BATCH} at least 4x its batch 1",
        threads=threads,
        gain=", ".join(f"{engine} {gain:.2f}x" for engine, gain in gains.items()),
    )


@pytest.mark.full
def test_one_busy_process(benchmark: Any, field: Field) -> None:
    """Decoding on all cores alone, and beside one process that never rests."""
    threads = ALL

    def both(engine: str, name: str, measure: Callable[[], float]) -> None:
        def disturbed() -> float:
            with busy_process():
                return measure()

        field.add(engine, f"{name}, alone", measure, "alone")
        field.add(engine, f"{name}, beside one", disturbed, "beside one")

    worker = field.kbit(4, threads)
    both("kbit", "4 bits", lambda: worker.rate("decode", tokens=64))

    def llama() -> None:
        field.peers.tool("llama-bench")
        field.peers.gguf("Q4_0")
        options = ("-p", "0", "-n", "64", "-r", "1")
        both("llama.cpp", "Q4_0", lambda: float(field.peers.llama_bench("Q4_0", threads, *options)["avg_ts"]))

    field.optional(llama)
    take_turns(benchmark, field.contestants)
    slower = {alone.engine: alone.median / beside.median for alone, beside in pairs(field.contestants)}
    report(
        benchmark,
        "one busy process",
        "tokens/s",
        field.contestants,
        missing=field.missing,
        goal="kbit at most 2.2x slower",
        threads=threads,
        slower=", ".join(f"{engine} {ratio:.2f}x" for engine, ratio in slower.items()),
    )


@pytest.mark.full
def test_load_to_first_token(benchmark: Any, field: Field, converted: Callable[..., Path]) -> None:
    """Seconds to a cold process's first token, files in the page cache: in all, and from opening the model on."""
    threads, model = ALL, converted(4, 8)

    # A fresh process each time; what it announces has both times in it.
    def inside() -> float:
        return float(started(field.kbit(4, threads, head=8))["first_token_seconds"])

    field.add("kbit", "4 bits, inside", inside, "inside")
    run = [
        "-m",
        "kbit.cli.main",
        "run",
        "--raw",
        FIRST_PROMPT,
        "--model",
        model,
        "--max-tokens",
        "1",
        "--threads",
        str(threads),
    ]
    field.add("kbit", "4 bits, kbit run", lambda: process_seconds([sys.executable, *run]), "process")

    def llama() -> None:
        field.peers.tool("llama-completion")
        field.peers.gguf("Q4_0")
        for part, name in (("inside", "inside"), ("process", "llama-completion")):
            field.add(
                "llama.cpp",
                f"Q4_0, {name}",
                lambda part=part: field.peers.llama_first_token("Q4_0", threads, FIRST_PROMPT)[part],
                part,
            )

    def others() -> None:
        field.peers.gguf("Q4_0")
        field.peers.path("openvino", "python")
        start = lambda: field.worker(field.peers.openvino("Q4_0", threads))  # noqa: E731
        field.add("OpenVINO", "Q4_0, inside", lambda: started(start())["first_token_seconds"], "inside")

    field.optional(llama)
    field.optional(others)
    take_turns(benchmark, field.contestants)
    report(
        benchmark,
        "load to first token",
        "seconds",
        field.contestants,
        missing=field.missing,
        goal="no more than llama.cpp's",
        higher_is_better=False,
        threads=threads,
    )


@pytest.mark.full
@by_bits
def test_memory(benchmark: Any, field: Field, bits: int) -> None:
    """Resident memory after a prompt of 512 and some decoding, in MB; llama.cpp's is its peak."""
    threads = ALL
    worker = field.kbit(bits, threads)
    worker.ask("prefill", tokens=PROMPT)
    cache = worker.ask("decode", tokens=16, depth=PROMPT)["cache_bytes"]
    limit = worker.ready["weights_bytes"] + 2 * cache + ALLOWANCE  # the runner keeps the caches of both
    field.add("kbit", f"{bits} bits", lambda: worker.ask("memory")["resident"] / 1e6)
    field.add("kbit", f"{bits} bits, peak", lambda: worker.ask("memory")["peak"] / 1e6)

    def llama() -> None:
        field.peers.tool("llama-bench")
        field.peers.gguf(LLAMA[bits])
        field.add("llama.cpp", LLAMA[bits], lambda: field.peers.llama_memory(LLAMA[bits], threads, PROMPT, 16) / 1e6)

    field.optional(llama)
    take_turns(benchmark, field.contestants, rounds=1)
    report(
        benchmark,
        "memory",
        "MB resident",
        field.contestants,
        missing=field.missing,
        goal=f"at most {limit / 1e6:.0f} MB: weights, KV cache and {ALLOWANCE / 1e6:.0f} MB",
        higher_is_better=False,
        bits=bits,
        limit_MB=limit / 1e6,
    )


def pairs(contestants: list[Contestant]) -> list[tuple[Contestant, Contestant]]:
    """Contestants two by two: (first, second), (third, fourth), ..."""
    return list(zip(contestants[::2], contestants[1::2], strict=True))


def started(worker: Worker) -> dict[str, Any]:
    """What a process announced; it has done its work."""
    worker.close()
    return worker.ready


def process_seconds(command: list[str | Path]) -> float:
    begin = perf_counter()
    subprocess.run([str(word) for word in command], check=True, capture_output=True, cwd=Path.home())
    return perf_counter() - begin
