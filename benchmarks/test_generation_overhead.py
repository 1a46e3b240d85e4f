"""What a token costs beside the model: choosing it, turning it into text, and the loop around.

    pytest benchmarks/test_generation_overhead.py -s

The decoder is a table of ready-made logits, so what is measured is the engine's own time, in microseconds per token.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.full  # not of a plain `pytest benchmarks/`

TOKENS, ROUNDS = 1000, 7
TEXT = "The river runs slowly through the valley, and the old bridge stands where the two roads meet. "

SETTINGS: dict[str, dict[str, float]] = {
    "greedy": {},
    "greedy, repetition penalty": {"repetition_penalty": 1.1},
    "temperature": {"temperature": 0.7},
    "temperature and top-p": {"temperature": 0.7, "top_p": 0.95},
    "temperature and top-k": {"temperature": 0.7, "top_k": 40},
}


class CountingCache:
    """A cache that holds nothing but its length."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.rows = [SimpleNamespace(length=0)]
        self.pool = SimpleNamespace(states=None)

    def kept_before(self, length: int) -> int:
        return length

    def truncate(self, length: int) -> None:
        self.rows[0].length = min(self.rows[0].length, length)


class ReadyMade:
    """A decoder that answers at once: logits (1, V) that make TEXT likely, whatever it is given."""

    def __init__(self, ids: list[int], vocab_size: int) -> None:
        noise = 3 * torch.randn(vocab_size, generator=torch.Generator().manual_seed(0))
        self.spec = SimpleNamespace(
            max_positions=1 << 30, longest_in_pieces=1 << 30, vocab_size=vocab_size, begins_anew_beyond=None
        )
        self.answers = []
        for token in ids:
            logits = noise.clone()
            logits[token] = 20.0
            self.answers.append(logits[None].numpy())
        self.count = 0

    def new_cache(self, batch: int, capacity: int) -> Any:
        return CountingCache(capacity)

    def extend(self, ids: Sequence[int], cache: Any, last_only: bool = True) -> Any:
        self.count += 1
        cache.rows[0].length += len(ids)
        return self.answers[self.count % len(self.answers)]


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Any:
    from kbit.models.opening import open_model
    from kbit.text.tokenizer import Tokenizer

    with open_model(str(smollm2)) as source:
        return Tokenizer.from_source(source)


@pytest.mark.parametrize("setting", SETTINGS)
def test_overhead(benchmark: Any, tokenizer: Any, setting: str) -> None:
    from kbit.engine.generate import generate
    from kbit.engine.sampler import SamplingParams

    ids = tokenizer.encode(TEXT)
    decoder = ReadyMade(ids, tokenizer.vocab_size)
    params = SamplingParams(**SETTINGS[setting], seed=0)
    times: list[float] = []

    def run() -> None:
        generation = generate(decoder, tokenizer, ids, params, max_tokens=TOKENS, stop_token_ids=())
        begin = time.perf_counter()
        result = generation.run()
        times.append((time.perf_counter() - begin) / result.completion_tokens)

    benchmark.pedantic(run, rounds=ROUNDS, warmup_rounds=1)
    microseconds = 1e6 * median(times)
    benchmark.extra_info["microseconds_per_token"] = microseconds
    print(f"\n{setting}: {microseconds:.1f} us per token, V = {decoder.spec.vocab_size}")


ROWS: dict[str, dict[str, float]] = {
    "greedy": {},
    "temperature 0.7": {"temperature": 0.7},
    "temperature 0.7, top-p 0.95": {"temperature": 0.7, "top_p": 0.95},
    "the usual: also top-k 40, min-p 0.05": {"temperature": 0.7, "top_k": 40, "top_p": 0.95, "min_p": 0.05},
    "repetition penalty, 2000 tokens seen": {"temperature": 0.7, "top_p": 0.95, "repetition_penalty": 1.1},
}


@pytest.mark.parametrize("setting", ROWS)
@pytest.mark.parametrize("sampler", ["native", "numpy"])
def test_a_row(benchmark: Any, sampler: str, setting: str) -> None:
    """Choosing the tokens of 16 answers at once, of 49,152 logits each: microseconds a row."""
    import numpy as np

    from kbit.engine.native_sampler import NativeSampler, sample_rows
    from kbit.engine.sampler import Sampler, SamplingParams

    rng = np.random.default_rng(0)
    logits = (3 * rng.standard_normal((16, 49152))).astype(np.float32)
    logits[:, 77] = 20  # a model that is sure
    prompt = rng.integers(0, 49152, 2000).tolist()
    params = SamplingParams(**ROWS[setting], seed=0)
    times: list[float] = []
    natives = [NativeSampler(params, prompt, choice) for choice in range(16)]
    plain = [Sampler(params, prompt, choice) for choice in range(16)]

    def run() -> None:
        begin = time.perf_counter()
        if sampler == "native":
            sample_rows(natives, logits, range(16))
        else:
            for each, row in zip(plain, logits, strict=True):
                each.sample(row)
        times.append((time.perf_counter() - begin) / len(logits))

    benchmark.pedantic(run, rounds=30, warmup_rounds=2)
    microseconds = 1e6 * median(times)
    benchmark.extra_info["microseconds_per_row"] = microseconds
    print(f"\n{sampler}, {setting}: {microseconds:.1f} us a row of 49152 (fastest {1e6 * min(times):.1f})")
