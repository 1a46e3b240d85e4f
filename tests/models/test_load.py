"""Sets of tensors become models: what is missing, surplus, of another shape or no number is named; what is held, and once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from config_cases import LLAMA, QWEN2
from decoder_cases import DictSource, tensors_for

from kbit.backends.reference.backend import ReferenceBackend
from kbit.formats.blockwise import quantize_blockwise
from kbit.formats.quant_format import QuantFormat
from kbit.formats.quant_tensor import QuantTensor
from kbit.host.errors import CheckpointError, KbitError, UnsupportedError, UsageError
from kbit.models.decoder import Decoder
from kbit.models.families import spec_from_config
from kbit.models.load import load_decoder


def load(config: dict[str, Any], tensors: Mapping[str, torch.Tensor | QuantTensor], **kwargs: Any) -> Decoder:
    return load_decoder(DictSource(config, tensors), ReferenceBackend(**kwargs))


def test_missing_tensors_are_listed() -> None:
    tensors = tensors_for(LLAMA)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(
        CheckpointError, match=r"some-model: 1 tensor \(model\.layers\.1\.mlp\.up_proj\.weight\) is missing"
    ):
        load(LLAMA, tensors)
    with pytest.raises(CheckpointError, match=r"some-model: 21 tensors \(.*, \.\.\.\) are missing"):
        load(LLAMA, {})
    del (tensors := tensors_for(LLAMA))["lm_head.weight"]
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        load(LLAMA, tensors)


def test_shapes_are_compared_before_anything_is_read() -> None:
    tensors = tensors_for(LLAMA)
    tensors["model.layers.1.self_attn.k_proj.weight"] = torch.zeros(24, 24)
    source = DictSource(LLAMA, tensors)
    with pytest.raises(
        CheckpointError, match=r"k_proj\.weight has shape \(24, 24\), but config\.json asks for \(8, 24\)"
    ):
        load_decoder(source, ReferenceBackend())
    assert source.reads == []


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.self_attn.q_proj.lora_A.weight",
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.2.mlp.up_proj.weight",
        "model.embed_positions.weight",
        "rotary_emb.inv_freq.weight",
    ],
)
def test_surplus_tensors_are_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"{name.replace('.', '[.]')}.* not part of a llama model"):
        load(LLAMA, {**tensors_for(LLAMA), name: torch.zeros(24)})


def test_hostile_text_stays_on_one_line() -> None:
    bad = "a\nb" * 1000
    for error, call in (
        (UnsupportedError, lambda: spec_from_config({**LLAMA, "model_type": bad})),
        (UnsupportedError, lambda: spec_from_config({**LLAMA, "architectures": [bad]})),
        (UnsupportedError, lambda: spec_from_config({**LLAMA, "rope_scaling": {"type": bad}})),
        (CheckpointError, lambda: spec_from_config({**LLAMA, "hidden_act": bad})),
        (CheckpointError, lambda: load(LLAMA, {**tensors_for(LLAMA), bad: torch.zeros(1)})),
    ):
        with pytest.raises(error) as caught:
            call()
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 1200  # all families are named


def test_old_rotary_buffers_are_ignored() -> None:
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2), "rotary_emb.inv_freq": torch.zeros(2)}
    ids = torch.tensor([[1, 2, 3]])
    plain, extra = load(LLAMA, tensors_for(LLAMA)), load(LLAMA, {**tensors_for(LLAMA), **old})
    assert torch.equal(plain.forward(ids, plain.new_cache(1, 3)), extra.forward(ids, extra.new_cache(1, 3)))


@pytest.mark.parametrize(
    ("name", "value", "count"),
    [
        ("model.embed_tokens.weight", math.nan, "1 NaN and 0 infinite"),
        ("model.layers.1.self_attn.o_proj.weight", math.inf, "0 NaN and 1 infinite"),
        ("model.layers.0.input_layernorm.weight", -math.inf, "0 NaN and 1 infinite"),
        ("lm_head.weight", math.nan, "1 NaN and 0 infinite"),
    ],
)
def test_values_that_are_not_numbers(name: str, value: float, count: str) -> None:
    tensors = tensors_for(LLAMA)
    damaged = tensors[name]
    assert isinstance(damaged, torch.Tensor)
    damaged.view(-1)[-1] = value
    with pytest.raises(CheckpointError, match=f"{name} holds {count}"):
        load(LLAMA, tensors)


def test_infinities_of_both_signs_do_not_cancel() -> None:
    tensors = tensors_for(LLAMA)
    tensors["lm_head.weight"].view(-1)[:2] = torch.tensor([math.inf, -math.inf])  # type: ignore[union-attr]
    with pytest.raises(CheckpointError, match="0 NaN and 2 infinite"):
        load(LLAMA, tensors)


def test_huge_but_finite_weights_are_no_error() -> None:
    """Their sum overflows float32, which must not be taken for infinity in the data."""
    tensors = tensors_for(LLAMA)
    tensors["lm_head.weight"] = torch.full((37, 24), 3e38)
    assert load(LLAMA, tensors).spec.vocab_size == 37


def test_damaged_scales_of_a_quantized_tensor() -> None:
    tensors = tensors_for(LLAMA)
    name = "model.layers.0.mlp.up_proj.weight"
    weight = tensors[name]
    assert isinstance(weight, torch.Tensor)
    quantized = quantize_blockwise(weight, QuantFormat.parse("int4-b16"))
    quantized.stored["scales"][3, 0] = math.nan
    with pytest.raises(CheckpointError, match=f"{name} holds 1 NaN"):
        load(LLAMA, {**tensors, name: quantized})


def test_a_tied_head_is_held_once() -> None:
    tied = {**LLAMA, "tie_word_embeddings": True}
    decoder = load(tied, tensors_for(tied))
    assert decoder.weights.head is decoder.weights.embedding
    separate = load(LLAMA, tensors_for(LLAMA))
    assert separate.weights.nbytes - decoder.weights.nbytes == 37 * 24 * 4


def test_a_tied_head_that_is_stored_again() -> None:
    tied = {**LLAMA, "tie_word_embeddings": True}
    tensors = tensors_for(tied)
    embedding = tensors["model.embed_tokens.weight"]
    assert isinstance(embedding, torch.Tensor)
    assert (
        load(tied, {**tensors, "lm_head.weight": embedding.clone()}).weights.nbytes
        == load(tied, tensors).weights.nbytes
    )
    other = embedding.clone()
    other[-1, -1] += 1
    for head in (other, embedding[:-1]):
        with pytest.raises(CheckpointError, match=r"tie_word_embeddings is true, but lm_head\.weight differs"):
            load(tied, {**tensors, "lm_head.weight": head})


def test_progress_counts_every_tensor() -> None:
    seen: list[tuple[int, int]] = []
    load_decoder(
        DictSource(QWEN2, tensors_for(QWEN2)),
        ReferenceBackend(),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(done, 27) for done in range(1, 28)]


def test_quantized_weights_packed_and_expanded() -> None:
    """Any matrix may be quantized, the tied embedding too; both ways of holding them give the same logits."""
    tied = {**LLAMA, "tie_word_embeddings": True}
    tensors = tensors_for(tied)
    quantized: dict[str, torch.Tensor | QuantTensor] = {}
    dequantized: dict[str, torch.Tensor | QuantTensor] = {}
    formats = [QuantFormat.parse(text) for text in ("nf4-b16", "int3-b16-asym", "int8-row", "float4e2m1-b32")]
    for index, (name, weight) in enumerate(tensors.items()):
        assert isinstance(weight, torch.Tensor)
        packed = quantize_blockwise(weight, formats[index % 4]) if weight.ndim == 2 else None
        quantized[name] = packed or weight
        dequantized[name] = packed.dequantize() if packed else weight
    ids = torch.tensor([[5, 0, 36, 5, 1]])
    plain = load(tied, dequantized)
    expected = plain.forward(ids, plain.new_cache(1, 5))
    for expand in (True, False):
        decoder = load(tied, quantized, expand=expand)
        assert decoder.weights.head is decoder.weights.embedding
        logits = decoder.forward(ids, decoder.new_cache(1, 5))
        assert torch.equal(logits, expected)  # the same float32 matrices in the same products
        assert (decoder.weights.nbytes < plain.weights.nbytes) is not expand
    assert "expanded" in ReferenceBackend(expand=True).describe()
    assert "packed" in ReferenceBackend(expand=False).describe()


@pytest.mark.parametrize(
    ("ids", "lengths", "names"),
    [
        (torch.tensor([[1, 37]]), None, "token id 37"),
        (torch.tensor([[-1, 3]]), None, "token id -1"),
        (torch.tensor([1, 2]), None, "int64"),
        (torch.tensor([[1.0, 2.0]]), None, "int64"),
        (torch.zeros(1, 0, dtype=torch.int64), None, "at least 1 token"),
        (torch.tensor([[1], [2]]), None, "2 rows"),
        (torch.tensor([[1, 2]]), torch.tensor([3]), "lengths"),
        (torch.tensor([[1, 2]]), torch.tensor([-1]), "lengths"),
        (torch.tensor([[1, 2]]), torch.tensor([1, 1]), "lengths"),
        (torch.tensor([[1, 2]]), torch.tensor([1.0]), "lengths"),
        (torch.tensor([[1, 2, 3, 4, 5]]), None, "KV cache holds 4 tokens"),
    ],
)
def test_bad_requests_leave_the_cache_alone(ids: torch.Tensor, lengths: torch.Tensor | None, names: str) -> None:
    decoder = load(LLAMA, tensors_for(LLAMA))
    cache = decoder.new_cache(1, 4)
    decoder.forward(torch.tensor([[7]]), cache)
    with pytest.raises(UsageError, match=names):
        decoder.forward(ids, cache, lengths)
    assert cache.lengths.tolist() == [1]
    assert issubclass(UsageError, KbitError)


def test_hidden_states_and_logits_are_forward_in_two_steps() -> None:
    decoder = load(LLAMA, tensors_for(LLAMA))
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    hidden = decoder.hidden_states(ids, decoder.new_cache(2, 3))
    assert hidden.shape == (2, 3, 24)
    assert not hidden.requires_grad
    assert torch.equal(decoder.logits(hidden), decoder.forward(ids, decoder.new_cache(2, 3)))
