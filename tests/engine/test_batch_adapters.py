"""LoRA adapters in the batch engine: requests with different ones share passes, weights and pages, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from adapter_cases import some, write_adapter
from decoder_cases import TINY
from engine_cases import Crowd, answer, tiny_decoder, tiny_engine
from native_cases import VOCABULARY

from kbit.engine.answers import Request
from kbit.engine.sampler import SamplingParams
from kbit.host.errors import UsageError
from kbit.models.adapters import add_adapters
from kbit.models.decoder import Decoder

HEADS = 16 * TINY["num_attention_heads"]
SHAPES = {
    f"model.layers.{layer}.{name}": shape
    for layer in range(TINY["num_hidden_layers"])
    for name, shape in {
        "self_attn.q_proj": (HEADS, 48),
        "self_attn.o_proj": (48, HEADS),
        "mlp.gate_proj": (77, 48),
        "mlp.down_proj": (48, 77),
    }.items()
}
NAMES = (None, "one", "two")


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    folder = tmp_path_factory.mktemp("adapters")
    folders: dict[str, Path] = {
        "one": write_adapter(folder / "one", "base", SHAPES, 4, seed=1),
        "two": write_adapter(folder / "two", "base", some(SHAPES, ("q_proj", "down")), 7, seed=2),
    }
    plain = tiny_decoder()
    config = {**TINY, "head_dim": 16, "model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    return add_adapters(plain, config, folders)


def some_requests(count: int) -> list[Request]:
    """Few different prompts, with a beginning of pages in common: what one adapter left must not serve another."""
    rng = np.random.default_rng(3)
    common = rng.integers(0, VOCABULARY, 130).tolist()
    found = []
    for index in range(count):
        prompt = (*common, *rng.integers(0, VOCABULARY, int(rng.integers(1, 40))).tolist())
        sampling = SamplingParams(temperature=float(rng.choice([0.0, 1.0])), seed=int(rng.integers(1 << 40)))
        choices, logprobs = int(rng.choice([1, 2])), 2 if index % 3 else None
        found.append(
            Request(prompt, sampling, max_tokens=int(rng.choice([3, 70])), choices=choices, logprobs=logprobs,
                    adapter=NAMES[index % 3])
        )  # fmt: skip
    return found


@pytest.mark.parametrize(("pages", "most_rows"), [(80, 512), (7, 60)])
def test_requests_with_other_adapters_change_nothing(decoder: Decoder, pages: int, most_rows: int) -> None:
    requests = some_requests(12)
    alone = [answer(tiny_engine(decoder), request).content for request in requests]
    rng = np.random.default_rng(4)
    engine = tiny_engine(decoder, pages)
    engine._rows = lambda: int(rng.integers(1, most_rows + 1))  # type: ignore[method-assign]
    coming = [*rng.permutation(len(requests)).tolist(), *rng.permutation(len(requests)).tolist()]
    crowd = Crowd(engine)
    while coming or len(engine):
        for _ in range(int(rng.integers(0, 4))):
            if coming:
                index = int(coming.pop())
                crowd.add(index, requests[index])
        crowd.step()
    assert (engine.preemptions > 0) == (pages < 20)
    assert engine.counters.cached_tokens > 0
    for live, each in crowd.found.items():
        assert each.content == alone[crowd.number[live]]


def test_an_adapter_is_a_text_of_its_own_to_the_cache(decoder: Decoder) -> None:
    """The same prompt: cached for the same adapter only, and answered as by a decoder that has no other."""
    prompt = tuple(np.random.default_rng(5).integers(0, VOCABULARY, 140).tolist())
    engine, texts = tiny_engine(decoder), []
    for name in NAMES:
        request = Request(prompt, SamplingParams(temperature=0.0), max_tokens=12, adapter=name, ignore_end=True)
        first, again = answer(engine, request), answer(engine, request)
        assert first.usage is not None
        assert again.usage is not None
        assert (first.usage.cached_tokens, again.usage.cached_tokens) == (0, 139)
        assert again.content == first.content
        if name is not None:
            own = answer(tiny_engine(decoder.with_adapter(name)), replace(request, adapter=None))
            assert own.content == first.content
        texts.append(first.texts[0])
    assert len(set(texts)) == len(NAMES)


def test_an_adapter_that_there_is_not(decoder: Decoder) -> None:
    with pytest.raises(UsageError, match="there is no adapter 'three': this model was loaded with one, two"):
        tiny_engine(decoder).check(Request((1, 2), adapter="three"))
