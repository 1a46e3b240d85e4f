"""One linear layer on the CPU: kbit at every width beside torch's own int4, int8 and bf16 products and bitsandbytes.

    pytest benchmarks/test_cpu_layers.py -s
    pytest benchmarks/test_cpu_layers.py -s -k "gemv and 1threads"
    pytest benchmarks/test_cpu_layers.py -s -k instruction_sets

M = 1 is measured against the read bandwidth, on so many copies of the layer that no cache holds them; M = 512 against
oneDNN's products of weights that were never packed. Nothing is asserted about time; how rounds are taken is in
test_cpu_engine.py. `error` is the result's relative distance from the unquantized product.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from measuring import ROUNDS, Contestant, report, take_turns, thread_counts
from peers import RUNNERS, Worker

from kbit.formats.quant_format import QuantFormat, default_dtype

SPREAD = 256_000_000  # bytes of copies: several times a third-level cache
WIDTHS = range(2, 9)
GEMV_SHAPES = ((14336, 4096), (4096, 14336))
GEMM_SHAPES = ((4096, 4096), (1536, 576))
PEERS_AT_ONE = ("torch-int4", "torch-int8", "torch-bf16-packed", "bitsandbytes-nf4")
PEERS_AT_MANY = ("torch-int8-gemm", "torch-bf16-packed", "torch-bf16", "torch-fp32", "torch-int4", "bitsandbytes-nf4")


def cases(shapes: tuple[tuple[int, int], ...], short: tuple[int, int] | None = None) -> Any:
    """Every shape on one and on all cores; what is not `short` on all cores only with --full."""
    return pytest.mark.parametrize(
        ("shape", "threads"),
        [
            pytest.param(
                (rows, columns),
                threads,
                id=f"{rows}x{columns}-{threads}threads",
                marks=() if ((rows, columns), threads) == (short, thread_counts()[-1]) else pytest.mark.full,
            )
            for rows, columns in shapes
            for threads in thread_counts()
        ],
    )


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def default_format(bits: int) -> str:
    """The format that `kbit quantize --bits` chooses."""
    return str(QuantFormat(default_dtype(bits), bits))


def layer_worker(stack: ExitStack, threads: int, **env: str) -> Worker:
    return stack.enter_context(Worker([sys.executable, RUNNERS / "layer_runner.py", "--threads", threads], env))


def add(
    contestants: list[Contestant], worker: Worker, kernel: str, shape: tuple[int, int], tokens: int, spread: int = 0
) -> None:
    """A kernel or kbit format as a contestant: milliseconds for one token, GFLOP/s for more."""
    rows, columns = shape
    made = worker.ask("prepare", kernel=kernel, rows=rows, columns=columns, spread=spread)

    def measure() -> float:
        seconds = float(worker.ask("run", tokens=tokens)["seconds"])
        return seconds * 1e3 if tokens == 1 else 2 * rows * columns * tokens / seconds / 1e9

    bits = made["bytes"] * 8 / (rows * columns)
    about = {"bytes": made["bytes"], "bits_per_weight": bits, "error": made["relative_error"]}
    engine = kernel.split("-")[0] if kernel.startswith(("torch", "bitsandbytes")) else "kbit"
    name = kernel if engine != "kbit" else f"kbit {kernel}"
    contestants.append(Contestant(engine, name, measure, about))


def add_peers(
    stack: ExitStack,
    contestants: list[Contestant],
    kernels: tuple[str, ...],
    threads: int,
    shape: tuple[int, int],
    tokens: int,
    spread: int = 0,
) -> list[str]:
    """The peers' kernels as contestants; the ones that cannot be had here, each with its reason."""
    missing = []
    for kernel in kernels:
        if kernel.startswith("bitsandbytes") and importlib.util.find_spec("bitsandbytes") is None:
            missing.append(f"{kernel}: not installed; to install it: pip install bitsandbytes")
            continue
        try:
            add(contestants, layer_worker(stack, threads), kernel, shape, tokens, spread)
        except RuntimeError as error:  # torch has not every kernel on every CPU
            missing.append(f"{kernel}: {str(error).splitlines()[0]}")
    return missing


@cases(GEMV_SHAPES, short=GEMV_SHAPES[0])
def test_gemv(benchmark: Any, stack: ExitStack, shape: tuple[int, int], threads: int) -> None:
    """One token, every width: no product can take less time than reading its weights."""
    contestants: list[Contestant] = []
    for bits in WIDTHS:
        add(contestants, layer_worker(stack, threads), default_format(bits), shape, 1, SPREAD)
    missing = add_peers(stack, contestants, PEERS_AT_ONE, threads, shape, 1, SPREAD)
    memory = layer_worker(stack, threads)
    reading = Contestant("memory", "read", lambda: memory.ask("bandwidth", seconds=0.3)["bytes_per_second"] / 1e9)
    take_turns(benchmark, [*contestants, reading])
    for contestant in contestants:
        rate = contestant.about["bytes"] / contestant.median / 1e6
        contestant.about.update({"GB/s": rate, "share_of_bandwidth": rate / reading.median})
    report(
        benchmark,
        "GEMV",
        "milliseconds",
        contestants,
        missing=missing,
        goal="85 % of the read bandwidth at every width, or of the int8 peak",
        higher_is_better=False,
        columns={"GB/s": ".1f", "share_of_bandwidth": ".0%", "bits_per_weight": ".2f", "error": ".4f"},
        controls=[reading],
        shape="x".join(map(str, shape)),
        threads=threads,
        read_bandwidth_GB_per_s=reading.median,
    )


@cases(GEMM_SHAPES)
def test_gemm(benchmark: Any, stack: ExitStack, shape: tuple[int, int], threads: int) -> None:
    """512 tokens, every width, beside oneDNN on unpacked weights."""
    contestants: list[Contestant] = []
    for bits in WIDTHS:
        add(contestants, layer_worker(stack, threads), default_format(bits), shape, 512)
    missing = add_peers(stack, contestants, PEERS_AT_MANY, threads, shape, 512)
    take_turns(benchmark, contestants)
    report(
        benchmark,
        "GEMM of 512 tokens",
        "GFLOP/s",
        contestants,
        missing=missing,
        goal="80 % of oneDNN's int8 (or bf16) product at every width",
        columns={"bits_per_weight": ".2f", "error": ".4f"},
        shape="x".join(map(str, shape)),
        threads=threads,
    )


@pytest.mark.full
@pytest.mark.parametrize("tokens", [1, 64])
@pytest.mark.parametrize("bits", WIDTHS, ids=[f"{bits}bit" for bits in WIDTHS])
def test_instruction_sets(benchmark: Any, stack: ExitStack, bits: int, tokens: int) -> None:
    """Every instruction set this machine has, one thread, 2048x2048."""
    from kbit import _native

    contestants: list[Contestant] = []
    for isa in _native.instruction_sets():
        worker = layer_worker(stack, 1, KBIT_CPU_ISA=isa)
        add(contestants, worker, default_format(bits), (2048, 2048), tokens)
        contestants[-1].name += f" {isa}"
    take_turns(benchmark, contestants, rounds=min(ROUNDS, 3))
    report(
        benchmark,
        "instruction sets",
        "milliseconds" if tokens == 1 else "GFLOP/s",
        contestants,
        bits=bits,
        tokens=tokens,
        shape="2048x2048",
        threads=1,
    )
