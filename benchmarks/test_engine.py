"""Tokens per second of the engine, beside transformers and beside what the memory allows.

    pytest benchmarks/test_engine.py -s

kbit and transformers run the same weights in turn, A B A B, in one process; ratios are of medians. The memory limit of
decoding is (bytes of weights read per token) over the measured read bandwidth.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

PROMPT_TOKENS, DECODE_TOKENS, ROUNDS = 512, 16, 5


@pytest.fixture(scope="module")
def decoder(smollm2: Path) -> Any:
    """SmolLM2 with nf4-b64 linear weights on the reference backend."""
    from kbit.checkpoint.resolve import open_model
    from kbit.formats.quant_format import QuantFormat
    from kbit.models.load import load_decoder
    from kbit.ops.select import select_backend
    from kbit.quantizers.plan import make_plan
    from kbit.quantizers.view import QuantizedView

    with open_model(str(smollm2)) as source:
        return load_decoder(
            QuantizedView(source, make_plan(source, QuantFormat.parse("nf4-b64"))), select_backend("cpu")
        )


@pytest.fixture(scope="module")
def peer(smollm2: Path) -> Any:
    """The same architecture in transformers, float32 (its weights do not matter to its speed)."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: no peer to compare with")
    from kbit.checkpoint.resolve import open_model

    with open_model(str(smollm2)) as source:
        config = transformers.LlamaConfig(**{k: v for k, v in source.config.items() if k != "architectures"})
    return transformers.LlamaForCausalLM(config).float().eval()


def timed(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def kbit_times(decoder: Any, ids: torch.Tensor) -> tuple[float, float]:
    """Seconds for the prompt, and per decoded token."""
    cache = decoder.new_cache(1, PROMPT_TOKENS + DECODE_TOKENS)
    prefill = timed(lambda: decoder.forward(ids, cache, last_only=True))
    step = timed(lambda: [decoder.forward(ids[:, :1], cache, last_only=True) for _ in range(DECODE_TOKENS)])
    return prefill, step / DECODE_TOKENS


@torch.inference_mode()
def peer_times(model: Any, ids: torch.Tensor) -> tuple[float, float]:
    begin = time.perf_counter()
    cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
    prefill = time.perf_counter() - begin
    step = timed(
        lambda: [
            model(ids[:, :1], past_key_values=cache, use_cache=True, logits_to_keep=1) for _ in range(DECODE_TOKENS)
        ]
    )
    return prefill, step / DECODE_TOKENS


def test_against_transformers(benchmark: Any, decoder: Any, peer: Any, read_bandwidth: Callable[[], float]) -> None:
    ids = torch.randint(0, decoder.spec.vocab_size, (1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))
    ours, theirs = [], []

    def round_trip() -> None:
        ours.append(kbit_times(decoder, ids))
        theirs.append(peer_times(peer, ids))

    benchmark.pedantic(round_trip, rounds=ROUNDS, warmup_rounds=1)
    prefill, step = (median(times[i] for times in ours) for i in (0, 1))
    peer_prefill, peer_step = (median(times[i] for times in theirs) for i in (0, 1))
    bandwidth = read_bandwidth()
    limit = bandwidth / decoder.weights.nbytes
    report = {
        "threads": torch.get_num_threads(),
        "backend": decoder.backend.describe(),
        "prefill_tokens_per_second": PROMPT_TOKENS / prefill,
        "decode_tokens_per_second": 1 / step,
        "prefill_over_transformers": peer_prefill / prefill,
        "decode_over_transformers": peer_step / step,
        "read_bandwidth_GB_per_s": bandwidth / 1e9,
        "decode_share_of_memory_limit": 1 / step / limit,
    }
    benchmark.extra_info.update(report)
    print(
        "\n"
        + "\n".join(
            f"{key}: {value if isinstance(value, (str, int)) else round(value, 3)}" for key, value in report.items()
        )
    )
