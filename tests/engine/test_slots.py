"""Slots: beginnings that are kept apart, leave the cache for a while, and come back with the same bits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from decoder_cases import TINY, DictSource, quantized, tame_tensors
from engine_cases import answer, check_pages, tiny_engine
from native_cases import VOCABULARY, native, reference, source_of

from kbit.engine.answers import Request
from kbit.engine.batch_engine import BatchEngine, Live
from kbit.engine.sampler import SamplingParams
from kbit.graph.pages import OutOfPagesError, pages_for
from kbit.host.errors import UnsupportedError, UsageError
from kbit.models.decoder import Decoder

CONFIG = {**TINY, "head_dim": 16, "model_type": "mistral", "max_position_embeddings": 1024}
GREEDY = SamplingParams(temperature=0.0)


def decoder_of(kv: str) -> Decoder:
    return native(DictSource(CONFIG, quantized(tame_tensors(CONFIG), "nf4-b32")), threads=1, kv=kv)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return decoder_of("fp16")


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(0, VOCABULARY, length).tolist())


def cached(engine: BatchEngine, ids: tuple[int, ...], slot: int | None) -> int:
    """How many tokens of a prompt were in the cache; its answer is the one without slots."""
    request = Request(ids, GREEDY, max_tokens=6, ignore_end=True, slot=slot)
    found = answer(engine, request)
    alone = answer(tiny_engine(engine._decoder), replace(request, slot=None))  # type: ignore[arg-type]
    assert found.content == alone.content
    assert found.usage is not None
    return found.usage.cached_tokens


def test_a_slot_shares_with_itself_alone(decoder: Decoder) -> None:
    engine, ids = tiny_engine(decoder), prompt(100)
    assert [cached(engine, ids, slot) for slot in (1, 2, None, 1, 2, None)] == [0, 0, 0, 99, 99, 99]
    assert engine.slots.erase((-1, 1)) == 105
    assert engine.slots.erase((-1, 1)) == 0
    assert [cached(engine, ids, slot) for slot in (1, 2, None, 1)] == [0, 99, 99, 99]
    check_pages(engine)


@pytest.mark.parametrize("kv", ["fp32", "fp16", "4", "8,3"])
@pytest.mark.parametrize("length", [3, 59, 150])
def test_what_was_saved_goes_on_elsewhere(kv: str, length: int) -> None:
    """In another engine, in another slot: with the same answer, of which nothing that was saved is computed again."""
    decoder = decoder_of(kv)
    engine, other, ids = tiny_engine(decoder), tiny_engine(decoder), prompt(length)
    cached(engine, ids, 1)
    saved = engine.slots.save((-1, 1))
    assert len(saved.ids) == length + 5  # all but the last of the answer, which was not computed
    assert tuple(saved.ids[:length]) == ids
    assert len(saved.pages) == pages_for(length + 5)
    cached(other, prompt(200, 1), 3)
    other.slots.restore((-1, 3), saved)
    check_pages(other)
    assert other.slots.save((-1, 3)).ids == saved.ids
    assert cached(other, (*saved.ids, 7, 8), 3) == length + 5
    assert cached(other, (*saved.ids, 9), None) == 0
    check_pages(other)
    check_pages(engine)


def test_what_is_gone_is_not_saved(decoder: Decoder) -> None:
    """The last text of a slot, as much of it as other texts have left there."""
    engine, ids = tiny_engine(decoder, pages=4), prompt(150)
    cached(engine, ids, 0)
    cached(engine, prompt(100, 1), None)
    saved = engine.slots.save((-1, 0))
    assert len(saved.ids) == 128
    assert tuple(saved.ids) == ids[:128]
    cached(engine, prompt(200, 2), None)
    with pytest.raises(UsageError, match="slot 0 is empty"):
        engine.slots.save((-1, 0))
    with pytest.raises(UsageError, match="slot 5 is empty: have a request with id_slot 5 answered first"):
        engine.slots.save((-1, 5))


def test_a_text_that_finds_no_room_changes_nothing(decoder: Decoder) -> None:
    engine, small = tiny_engine(decoder), tiny_engine(decoder, pages=3)
    cached(engine, prompt(150), 0)
    cached(small, prompt(20), 0)
    long = Live(Request(prompt(64, 3), GREEDY, max_tokens=20, ignore_end=True), small.tokenizer)
    small.add(long)
    small.step()
    with pytest.raises(OutOfPagesError, match="155 tokens need 3 pages of the KV cache, of which 2 are free"):
        small.slots.restore((-1, 0), engine.slots.save((-1, 0)))
    assert len(small.slots.save((-1, 0)).ids) == 25
    while len(small):
        small.step()
    small.slots.restore((-1, 0), engine.slots.save((-1, 0)))
    for _ in range(2):  # though it fills the pool
        assert small.slots.save((-1, 0)).ids == engine.slots.save((-1, 0)).ids


def test_models_without_slots_say_so() -> None:
    for decoder, why in (
        (native(source_of("qwen3_5"), threads=1), "slots of a recurrent model are not saved"),
        (reference(source_of("llama")), "start with --backend native"),
    ):
        engine = tiny_engine(decoder)
        answer(engine, Request(prompt(5), max_tokens=3, slot=0))
        with pytest.raises(UnsupportedError, match=why):
            engine.slots.save((-1, 0))
