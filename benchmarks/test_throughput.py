"""Tokens per second at every width and on every backend of the CPU, beside what this machine's memory and cores can do.

    pytest benchmarks/test_throughput.py -s        # two to three minutes

Decoding is held against memory: `GB/s` is tokens/s times the bytes of weights that a token reads, `share` that over the
read bandwidth measured in the same rounds. A prompt is held against arithmetic: `GFLOP/s` counts two operations per
weight of a linear layer and token, `share` is that over torch's own product of 512 tokens (oneDNN: int8, or float32
where the CPU has none) in the same rounds; it can exceed 1. Widths take turns, so that none has the machine at its
best. The reference, torch in float32, is what the kernels are tested against, and much slower on purpose; its widths
run one after the other, since each takes a model's float32 size. A GPU: pytest benchmarks/ --device cuda.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
from limits import product_rate, read_bandwidth
from measuring import ROUNDS, Contestant, cores, report, take_turns
from peers import RUNNERS, Worker

if TYPE_CHECKING:
    from ladder import Ladder

DECODE, PROMPT = 64, 512  # tokens
REFERENCE_DECODE, REFERENCE_PROMPT = 8, 128


@pytest.fixture
def worker() -> Iterator[Worker]:
    """torch in a process of its own, stopped while it is not asked: threads that wait would take the engine's cores."""
    with Worker([sys.executable, RUNNERS / "layer_runner.py", "--threads", cores()]) as worker:
        yield worker


def machine_limits(worker: Worker) -> tuple[Contestant, Contestant]:
    """Read bandwidth in GB/s, and a product of 512 tokens in GFLOP/s."""
    return read_bandwidth(worker), product_rate(worker)


def with_shares(contestants: list[Contestant], memory: Contestant, product: Contestant) -> None:
    """Adds to every contestant what it takes of the machine."""
    for contestant in contestants:
        about = contestant.about
        if about["phase"] == "decode":
            about["GB/s"] = contestant.median * about["bytes_per_token"] / 1e9
            about["share"] = about["GB/s"] / memory.median
        else:
            about["GFLOP/s"] = 2 * contestant.median * about["linear_weights"] / 1e9
            about["share"] = about["GFLOP/s"] / product.median


def contestants_of(plan: Any, rung: dict[str, Any], decoder: Any, decode: int, prompt: int) -> list[Contestant]:
    """A width's decoding and its prompt, with what with_shares and a report want to know of it.

    Args:
        plan: how the width is stored.
        rung: what a report says of it.
        decode, prompt: tokens of one measurement.
    """
    from ladder import Pace, bytes_per_token

    pace = Pace(decoder, decode, prompt)
    about = {
        **rung,
        # the weights that a prompt's token is multiplied by
        "linear_weights": sum(x.source.numel for x in plan.tensors if x.role == "linear"),
        "bytes_per_token": bytes_per_token(decoder),
    }
    return [
        Contestant("kbit", f"{rung['bits']} bits, {phase}", measure, {**about, "phase": phase}, phase)
        for phase, measure in (("decode", pace.decode), ("prefill", pace.prefill))
    ]


def gone() -> float:
    """In the place of a measurement whose model has made room for the next."""
    raise RuntimeError("this model is not in memory any more")


def tell(benchmark: Any, contestants: list[Contestant], limits: tuple[Contestant, Contestant], **about: Any) -> None:
    """Decoding first, then prompts."""
    with_shares(contestants, *limits)
    columns = {"GB/s": ".2f", "GFLOP/s": ".0f", "share": ".0%", "bits_per_weight": ".2f"}
    ordered = sorted(contestants, key=lambda contestant: contestant.group)
    report(benchmark, "throughput", "tokens/s", ordered, columns=columns, controls=limits, **about)


def test_native(benchmark: Any, ladder: Ladder, worker: Worker) -> None:
    """kbit's own kernels, as `kbit run` uses them: int8 arithmetic, 16-bit keys and values, all cores."""
    contestants: list[Contestant] = []
    prompt = min(PROMPT, ladder.rungs[0].decoder.spec.max_positions)
    for rung in ladder.rungs:
        contestants += contestants_of(rung.plan, rung.about(), rung.decoder, DECODE, prompt)
    limits = machine_limits(worker)
    take_turns(benchmark, [*contestants, *limits])
    backend = ladder.rungs[0].decoder.backend
    goal = "decode: 85 % of the bandwidth on models that no cache holds"
    tell(
        benchmark,
        contestants,
        limits,
        model=ladder.name,
        engine="native",
        backend=backend.describe(),
        prompt=prompt,
        goal=goal,
    )


def test_reference(benchmark: Any, ladder: Ladder, worker: Worker) -> None:
    """Plain torch in float32 on the same weights, one width after the other."""
    from ladder import WIDTHS

    from kbit.backends.select import select_backend

    backend = select_backend("cpu", backend="reference")
    limits = machine_limits(worker)
    contestants: list[Contestant] = []

    def measure() -> None:
        for bits in WIDTHS:
            plan = ladder.plan(bits)
            decoder = ladder.load(plan, backend)
            about = {"bits": bits, "bits_per_weight": plan.bits_per_weight()}
            turns = contestants_of(plan, about, decoder, REFERENCE_DECODE, REFERENCE_PROMPT)
            for _ in range(min(ROUNDS, 3)):
                for turn in (*turns, *limits):
                    turn.values.append(turn.measure())
            contestants.extend(turns)
            for turn in turns:  # or the model would stay in memory
                turn.measure = gone

    benchmark.pedantic(measure, rounds=1)
    tell(
        benchmark,
        contestants,
        limits,
        model=ladder.name,
        engine="reference",
        backend=backend.describe(),
        prompt=REFERENCE_PROMPT,
    )
