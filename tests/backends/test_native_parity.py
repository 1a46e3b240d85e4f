"""The native backend against the reference: tiny models of every family, in fp32, on every instruction set."""

from __future__ import annotations

import pytest
import torch
from decoder_cases import CASES, DictSource, tame_tensors, tiny_config
from native_cases import ISAS, VOCABULARY, assert_close, exact, random_ids, reference, source_of

from kbit.models.decoder import Decoder

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest) -> tuple[Decoder, Decoder]:
    """(native, reference) of one model, half of the cases with quantized weights."""
    source = source_of(request.param, "nf4-b16" if list(CASES).index(request.param) % 2 else None)
    return exact(source), reference(source)


def test_prefill_beyond_the_context_and_decoding(pair: tuple[Decoder, Decoder]) -> None:
    """35 tokens, longer than every window here and than max_position_embeddings (32), then 5 one by one."""
    ours, theirs = pair
    ids = random_ids(2, 40)
    caches = ours.new_cache(2, 40), theirs.new_cache(2, 40)
    for part in (ids[:, :35], *ids[:, 35:].split(1, dim=1)):
        assert_close(ours.forward(part, caches[0]), theirs.forward(part, caches[1]))
    assert caches[0].lengths.tolist() == [40, 40]


def test_ragged_batches(pair: tuple[Decoder, Decoder]) -> None:
    """Idle rows among them; padding is zeros, and the last token of an idle row too."""
    ours, theirs = pair
    caches = ours.new_cache(3, 40), theirs.new_cache(3, 40)
    for index, taken in enumerate([(17, 5, 1), (0, 9, 3), (1, 1, 1), (0, 0, 0), (22, 0, 30)]):
        lengths = torch.tensor(taken)
        ids = random_ids(3, max(*taken, 1), seed=index)
        every = theirs.forward(ids, caches[1], lengths)
        found = ours.forward(ids, caches[0], lengths)
        for row, length in enumerate(taken):
            if length:
                assert_close(found[row, :length], every[row, :length])
            assert not found[row, length:].any()
        if ours.spec.states:
            continue  # a recurrent model goes back only to where its state was kept
        for cache in caches:
            cache.truncate(cache.lengths - lengths.numpy())
        last = ours.forward(ids, caches[0], lengths, last_only=True)
        theirs.forward(ids, caches[1], lengths)
        assert last.shape == (3, 1, VOCABULARY)
        for row, length in enumerate(taken):
            assert torch.equal(last[row, 0], found[row, length - 1] if length else torch.zeros(VOCABULARY))
    assert caches[0].lengths.tolist() == [40, 15, 35]


def test_hidden_states_and_logits_are_forward_in_two_steps(pair: tuple[Decoder, Decoder]) -> None:
    ours, theirs = pair
    ids, lengths = random_ids(2, 7), torch.tensor([7, 4])
    hidden = ours.hidden_states(ids, ours.new_cache(2, 7), lengths)
    expected = theirs.hidden_states(ids, theirs.new_cache(2, 7), lengths)
    for row, length in enumerate((7, 4)):
        assert_close(hidden[row, :length], expected[row, :length])
    whole = ours.forward(ids, ours.new_cache(2, 7), lengths)
    assert torch.equal(ours.logits(hidden)[0], whole[0])
    assert torch.equal(ours.logits(hidden[1, :4]), whole[1, :4])


def test_greedy_text(pair: tuple[Decoder, Decoder]) -> None:
    texts = []
    for decoder in pair:
        cache, new, tokens = decoder.new_cache(1, 60), random_ids(1, 11, seed=4), []
        for _ in range(32):
            new = decoder.forward(new, cache, last_only=True).argmax(-1)
            tokens.append(int(new))
        texts.append(tokens)
    assert texts[0] == texts[1]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "format", [None, "int8-row", "nf4-b64-dq", "int3-b16-asym", "lloyd5-b32", "float6e3m2-b16-bf16"]
)
def test_every_instruction_set_computes_the_reference(isa: str, format: str | None) -> None:
    source = source_of("qwen2", format)
    ours, theirs = exact(source, isa=isa), reference(source)
    ids = random_ids(2, 20)
    assert_close(ours.forward(ids, ours.new_cache(2, 20)), theirs.forward(ids, theirs.new_cache(2, 20)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("isa", ISAS)
def test_sixteen_bit_weights_stay_sixteen_bit(isa: str, dtype: torch.dtype) -> None:
    """A file's 16-bit floats are held as they are, and mean exactly what they mean to the reference."""
    config = tiny_config("llama")
    tensors = {name: x.to(dtype).float() for name, x in tame_tensors(config).items() if isinstance(x, torch.Tensor)}
    source = DictSource(config, tensors, stored_as="F16" if dtype is torch.float16 else "BF16")
    wide = exact(DictSource(config, tensors), isa=isa)
    ours, theirs = exact(source, isa=isa), reference(source)
    ids = random_ids(1, 20)
    assert_close(ours.forward(ids, ours.new_cache(1, 20)), theirs.forward(ids, theirs.new_cache(1, 20)))
    matrices = sum(x.numel() for x in tensors.values() if x.ndim == 2)
    # The layout pads columns to 64 and rows to 16, here by less than the matrices' own size.
    assert wide.weights.nbytes - ours.weights.nbytes >= 2 * matrices
    assert ours.weights.nbytes < 0.6 * wide.weights.nbytes
