"""Latent attention in the batch engine: pages of latent vectors are shared, given up and made again like any others."""

from __future__ import annotations

import numpy as np
import pytest
from decoder_cases import DictSource, quantized, tame_tensors, tiny_config
from engine_cases import answer, answers, tiny_engine
from native_cases import VOCABULARY, native

from kbit.engine.answers import Request
from kbit.engine.sampler import SamplingParams
from kbit.models.decoder import Decoder

pytestmark = pytest.mark.usefixtures("one_thread")

# What the compressed cache needs: multiples of 16.
SIZES = {"kv_lora_rank": 48, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32}


@pytest.fixture(scope="module", params=["fp16", "4"])
def decoder(request: pytest.FixtureRequest) -> Decoder:
    """DeepSeek-V3's layers, experts among them, with the cache in 16 and in 4 bits."""
    config = {**tiny_config("deepseek-v3"), **SIZES, "max_position_embeddings": 1024}
    found = native(DictSource(config, quantized(tame_tensors(config), "nf4-b16")), threads=1, kv=request.param)
    assert found.spec.keeps_latents
    assert found.spec.cache_heads == (1, 64)
    return found


def test_pages_of_an_answer_serve_the_next_turn(decoder: Decoder) -> None:
    engine = tiny_engine(decoder)
    prompt = tuple(range(30))
    first = answer(engine, Request(prompt, max_tokens=70, ignore_end=True))
    turn = (*prompt, *first.ids(), 1, 2, 3)
    again = answer(engine, Request(turn, max_tokens=8, logprobs=3))
    assert again.usage is not None
    assert again.usage.cached_tokens == len(prompt) + 70 - 1  # (the last one was never computed)
    assert again.content == answer(tiny_engine(decoder), Request(turn, max_tokens=8, logprobs=3)).content


def test_what_is_given_up_for_others_is_computed_again(decoder: Decoder) -> None:
    """More texts than there are pages: each is answered as if it were alone, to the last log-probability."""
    rng = np.random.default_rng(3)
    common = rng.integers(0, VOCABULARY, 80).tolist()
    requests = []
    for index in range(6):
        own = rng.integers(0, VOCABULARY, int(rng.choice([5, 40, 70]))).tolist()
        prompt = common + own if index % 2 else own
        sampling = SamplingParams(temperature=0.8 if index % 3 else 0.0, seed=index)
        requests.append(Request(tuple(prompt), sampling, max_tokens=70, ignore_end=True, logprobs=2))
    alone = [answer(tiny_engine(decoder), request) for request in requests]
    engine = tiny_engine(decoder, 8)
    found = answers(engine, requests)
    assert engine.preemptions > 0
    assert engine.counters.cached_tokens > 0
    for one, each in zip(alone, found, strict=True):
        assert each.error is None
        assert each.content == one.content
