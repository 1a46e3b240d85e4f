"""What `kbit plan` predicts beside what `kbit run` then takes: memory, tokens per second, prompt tokens per second.

    pytest benchmarks/test_plan.py -s --benchmark-json results.json        # about three minutes on 2 cores

Every case is `kbit run` in a process of its own, on a converted SmolLM2 and on the models of KBIT_DATA, at several
widths and cache widths. A round times this machine's kernels anew and then runs every case; errors are those of the
median prediction against the median measurement over KBIT_BENCH_ROUNDS rounds, since on a shared machine both vary.
Nothing is asserted about time.

The error in memory is that of everything but the process's constant: (predicted - measured) / (measured - constant).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from measuring import ROUNDS, machine, machine_line

THREADS = int(os.environ.get("KBIT_BENCH_THREADS", "1").split(",")[0])
KV = {16: "fp16", 8: "8", 4: "4", 2: "2"}
# Words that are one or two tokens each in both vocabularies.
SENTENCE = "The old man went down to the sea in the morning and looked at the boats that lay on the sand. "


@dataclass
class Case:
    """A model with a cache width and a length of text, and what was measured and predicted of it."""

    name: str
    model: Path
    kv_bits: int
    sentences: int
    tokens: int
    prompt: int = 0
    measured: dict[str, list[float]] = field(default_factory=lambda: {"memory": [], "decode": [], "prompt": []})
    predicted: dict[str, list[float]] = field(default_factory=lambda: {"memory": [], "decode": [], "prompt": []})

    def run(self) -> None:
        """Once through `kbit run`."""
        command = [
            sys.executable,
            "-m",
            "kbit",
            "run",
            "--raw",
            "-",
            "--model",
            str(self.model),
            "--threads",
            str(THREADS),
        ]
        command += ["--kv-bits", str(self.kv_bits), "--max-tokens", str(self.tokens), "--json"]
        with tempfile.TemporaryDirectory() as elsewhere:  # the checkout's kbit/ has no compiled module
            done = subprocess.run(
                command, input=SENTENCE * self.sentences, capture_output=True, text=True, check=True, cwd=elsewhere
            )
        answer = json.loads(done.stdout)
        self.prompt = answer["prompt_tokens"]
        assert answer["completion_tokens"] > 8, f"{self.name}: the model stopped at once"
        self.tokens_made = answer["completion_tokens"]
        self.measured["memory"].append(answer["peak_rss_bytes"])
        self.measured["decode"].append(answer["decode_tokens_per_second"])
        self.measured["prompt"].append(answer["prompt_tokens"] / answer["time_to_first_token_s"])

    def predict(self, rates: Any) -> None:
        """Once from the shapes and this machine's rates."""
        from kbit.models.families import spec_from_config
        from kbit.models.opening import open_model
        from kbit.planner.memory import predict_memory
        from kbit.planner.speed import needed_attention, needed_kernels, predict_speed, prompt_seconds
        from kbit.planner.weights import stored_weights

        with open_model(str(self.model)) as source:
            spec = spec_from_config(source.config)
            weights = stored_weights(source, spec)
        kv = KV[self.kv_bits]
        known = rates(needed_kernels(weights, spec.tied_embeddings), [needed_attention(spec, kv)])
        middle = self.prompt + self.tokens_made // 2
        use = predict_memory(
            spec, weights, context=self.prompt + self.tokens_made, prompt=self.prompt, kv=kv, threads=THREADS
        )
        self.predicted["memory"].append(use.peak + known.constant_bytes)
        self.predicted["decode"].append(predict_speed(spec, weights, known, context=middle, kv=kv).decode)
        self.predicted["prompt"].append(self.prompt / prompt_seconds(spec, weights, known, self.prompt, kv))

    def error(self, what: str, constant: float) -> float:
        """Of the medians, as a fraction."""
        base = constant if what == "memory" else 0.0
        measured = median(self.measured[what])
        return (median(self.predicted[what]) - measured) / (measured - base)


@pytest.fixture
def cases(converted: Callable[[int, int], Path], data_dir: Path) -> list[Case]:
    """SmolLM2 at four widths and three cache widths, and the small models of KBIT_DATA."""
    found = [Case(f"SmolLM2 {bits} bits", converted(bits, 8), 16, 8, 64) for bits in (2, 3, 4, 8)]
    found += [Case(f"SmolLM2 4 bits, KV {kv}", converted(4, 8), kv, 60, 64) for kv in (16, 8, 4)]
    for name in ("novels-0.7m", "novels-2m", "novels-5m"):
        if (data_dir / "models" / name).is_dir():
            found.append(Case(name, data_dir / "models" / name, 16, 3, 160))
    return found


@pytest.mark.full
def test_predictions(benchmark: Any, cases: list[Case]) -> None:
    """Errors of `kbit plan` on this machine."""
    from kbit.planner.machine import machine_speed

    constants: list[float] = []
    last: list[Any] = []

    def one_round() -> None:
        first = True

        def rates(kernels: Any, shapes: Any) -> Any:
            nonlocal first
            again, first = first, False
            return machine_speed(kernels, shapes, threads=THREADS, remeasure=again)

        for case in cases:
            case.run()
            case.predict(rates)
        last[:] = [rates((), ())]
        constants.append(last[0].constant_bytes)

    benchmark.pedantic(one_round, rounds=ROUNDS)
    constant = median(constants)
    rows = [
        {
            "case": case.name,
            "prompt": case.prompt,
            "kv_bits": case.kv_bits,
            **{
                what: {
                    "measured": median(case.measured[what]),
                    "predicted": median(case.predicted[what]),
                    "error": case.error(what, constant),
                    "values": case.measured[what],
                }
                for what in case.measured
            },
        }
        for case in cases
    ]
    benchmark.extra_info.update(
        {"case": "plan", "threads": THREADS, "constant_bytes": constant, "machine": machine(), "rows": rows}
    )
    print(f"\n\nkbit plan against kbit run, {THREADS} thread(s), medians of {ROUNDS} rounds\n{machine_line()}")
    print(f"constant of a process {constant / 1e6:.1f} MB; bandwidth {last[0].bandwidth / 1e9:.1f} GB/s")
    print(f"  {'case':<24}{'MB above constant':>26}{'decode tokens/s':>28}{'prompt tokens/s':>28}")
    for case in cases:
        line = f"  {case.name:<24}"
        for what, base, unit in (("memory", constant, 1e6), ("decode", 0.0, 1.0), ("prompt", 0.0, 1.0)):
            measured, predicted = ((median(v[what]) - base) / unit for v in (case.measured, case.predicted))
            line += f"{measured:>10.1f}{predicted:>10.1f}{case.error(what, constant):>+8.1%}"
        print(line)
    for what in ("memory", "decode", "prompt"):
        errors = sorted(abs(case.error(what, constant)) for case in cases)
        print(f"  {what}: median error {median(errors):.1%}, worst {errors[-1]:.1%}")
