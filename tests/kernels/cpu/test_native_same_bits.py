"""Results do not depend on the threads, on what else is in the batch, on how a text is cut, or on the instruction set."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoder_cases import TINY, DictSource, quantized, tame_tensors
from native_cases import ISAS, computes, native, random_ids, source_of

from kbit.backends.cpu import runner as native_runner
from kbit.host.errors import UsageError
from kbit.models.decoder import Decoder

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ("fp16", "8", "3")


@pytest.fixture(scope="module", params=[(isa, compute) for isa in ISAS for compute in computes(isa)], ids="-".join)
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {"isa": request.param[0], "compute": request.param[1]}


@pytest.fixture(scope="module")
def source() -> DictSource:
    config = {**TINY, "head_dim": 16, "model_type": "mistral", "sliding_window": 19}
    return DictSource(config, quantized(tame_tensors(config), "nf4-b32"))


@pytest.fixture(scope="module", params=KINDS)
def decoder(request: pytest.FixtureRequest, source: DictSource, options: dict[str, Any]) -> Decoder:
    return native(source, kv=request.param, **options)


@pytest.fixture(scope="module")
def whole(decoder: Decoder) -> torch.Tensor:
    """Logits of 3 texts of 40 tokens, each alone and at once: (3, 40, V)."""
    ids = random_ids(3, 40)
    return torch.cat([decoder.forward(row[None], decoder.new_cache(1, 40)) for row in ids])


def test_threads(source: DictSource, options: dict[str, Any], decoder: Decoder, whole: torch.Tensor) -> None:
    kv = decoder.backend.kv  # type: ignore[attr-defined]
    for threads in (1, 3):
        other = native(source, threads=threads, kv=kv, **options)
        assert torch.equal(other.forward(random_ids(3, 40)[:1], other.new_cache(1, 40)), whole[:1])


def test_batches(decoder: Decoder, whole: torch.Tensor) -> None:
    ids = random_ids(3, 40)
    assert torch.equal(decoder.forward(ids, decoder.new_cache(3, 40)), whole)
    lengths = torch.tensor([3, 40, 22])
    ragged = decoder.forward(ids, decoder.new_cache(3, 40), lengths)
    for row, length in enumerate(lengths.tolist()):
        assert torch.equal(ragged[row, :length], whole[row, :length])


def test_pieces(decoder: Decoder, whole: torch.Tensor) -> None:
    """Prefill in pieces, then token by token, then several at once as speculation does, with some taken back."""
    ids = random_ids(3, 40)[:1]
    cache = decoder.new_cache(1, 40)
    for start, stop in [(0, 13), (13, 30), *((at, at + 1) for at in range(30, 35)), (35, 40)]:
        assert torch.equal(decoder.forward(ids[:, start:stop], cache), whole[:1, start:stop])
    cache.truncate(33)
    assert torch.equal(decoder.forward(ids[:, 33:], cache), whole[:1, 33:])


def test_passes(decoder: Decoder, whole: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_runner, "PASS_ROWS", 7)
    ids = random_ids(3, 40)
    assert torch.equal(decoder.forward(ids, decoder.new_cache(3, 40)), whole)
    last = decoder.forward(ids, decoder.new_cache(3, 40), torch.tensor([40, 1, 0]), last_only=True)
    assert torch.equal(last[:2, 0], torch.stack([whole[0, -1], whole[1, 0]]))
    hidden = decoder.hidden_states(ids, decoder.new_cache(3, 40))
    assert torch.equal(decoder.logits(hidden), whole)


def test_caches_that_grew_or_were_rearranged(decoder: Decoder, whole: torch.Tensor) -> None:
    ids = random_ids(3, 40)
    cache = decoder.new_cache(3, 11)
    decoder.forward(ids[:, :11], cache)
    with pytest.raises(UsageError, match="holds 11 tokens per row: row 0 has 11 and 29 more do not fit"):
        decoder.forward(ids[:, 11:], cache)
    before = cache.nbytes
    cache.grow(70)  # a page more
    assert cache.capacity >= 40
    assert cache.nbytes > before
    cache.select(torch.tensor([2, 0, 2]))
    assert cache.lengths.tolist() == [11, 11, 11]
    found = decoder.forward(ids[[2, 0, 2], 11:], cache)
    assert torch.equal(found, whole[[2, 0, 2], 11:])


def test_a_text_of_several_passes() -> None:
    """Longer than the rows of a pass (512), than blocks of the cache and of the rotary table, and than the context."""
    decoder = native(source_of("llama", "int4-b16"))
    ids = random_ids(1, 600)
    whole = decoder.forward(ids, decoder.new_cache(1, 600))
    cache = decoder.new_cache(1, 64)
    for start, stop in [(0, 63), (63, 64), (64, 65), (65, 590), *((at, at + 1) for at in range(590, 600))]:
        cache.grow(stop)
        assert torch.equal(decoder.forward(ids[:, start:stop], cache), whole[:, start:stop])


def test_instruction_sets_agree_to_the_bit() -> None:
    source = source_of("qwen2", "nf4-b16")
    ids = random_ids(1, 20)
    for compute in ("int8", "fp32"):
        decoders = [native(source, compute=compute, isa=isa) for isa in ISAS]
        first, *others = (decoder.forward(ids, decoder.new_cache(1, 20)) for decoder in decoders)
        for isa, other in zip(ISAS[1:], others, strict=True):
            assert torch.equal(first, other), f"{compute} on {isa}"
