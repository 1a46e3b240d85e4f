"""Configurations become specs, bad ones become errors that name key and value; so do bad sets of tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from decoder_cases import DictSource, tensors_for

from kbit.backends.reference.backend import ReferenceBackend
from kbit.formats.blockwise import quantize_blockwise
from kbit.formats.quant_format import QuantFormat
from kbit.formats.quant_tensor import QuantTensor
from kbit.host.errors import CheckpointError, KbitError, UnsupportedError, UsageError
from kbit.models.decoder import Decoder
from kbit.models.families import FAMILIES, spec_from_config
from kbit.models.load import load_decoder

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 37,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
MISTRAL = {**LLAMA, "model_type": "mistral", "architectures": ["MistralForCausalLM"]}
QWEN2 = {**LLAMA, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}


def load(config: dict[str, Any], tensors: Mapping[str, torch.Tensor | QuantTensor], **kwargs: Any) -> Decoder:
    return load_decoder(DictSource(config, tensors), ReferenceBackend(**kwargs))


# ---- configurations that mean something --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        LLAMA,
        MISTRAL,
        QWEN2,
        {**LLAMA, "tie_word_embeddings": True},
        {**LLAMA, "attention_bias": True, "mlp_bias": True},
    ],
)
def test_expected_tensors_are_those_transformers_saves(config: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    their_config = transformers.AutoConfig.for_model(**config)
    model = transformers.AutoModelForCausalLM.from_config(their_config)
    theirs = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert spec_from_config(config).expected_tensors() == theirs


@pytest.mark.parametrize("config", [LLAMA, MISTRAL, QWEN2])
def test_absent_keys_take_transformers_defaults(config: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    sparse = {key: value for key, value in config.items() if key != "num_key_value_heads"}
    sparse["num_attention_heads"] = 32
    sparse["hidden_size"] = 64
    theirs = transformers.AutoConfig.for_model(**sparse)
    spec = spec_from_config(sparse)
    assert spec.kv_heads == theirs.num_key_value_heads
    assert spec.max_positions == theirs.max_position_embeddings
    assert spec.norm_eps == theirs.rms_norm_eps
    assert spec.activation == theirs.hidden_act
    assert spec.tied_embeddings == theirs.tie_word_embeddings
    assert spec.rope.theta == theirs.rope_parameters["rope_theta"]
    window = getattr(theirs, "sliding_window", None)
    assert spec.windows == (window, window)
    # A config.json that transformers writes in full means the same as the sparse one.
    assert spec_from_config(json.loads(theirs.to_json_string())) == spec


@pytest.mark.parametrize(
    ("base", "changes", "windows"),
    [
        (LLAMA, {"sliding_window": 5}, (None, None)),
        (MISTRAL, {"sliding_window": 5}, (5, 5)),
        (MISTRAL, {"sliding_window": None}, (None, None)),
        (QWEN2, {"sliding_window": 5}, (None, None)),
        (QWEN2, {"sliding_window": 5, "use_sliding_window": True}, (None, None)),
        (QWEN2, {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1}, (None, 5)),
        (QWEN2, {"sliding_window": None, "use_sliding_window": True, "max_window_layers": 0}, (None, None)),
        (
            QWEN2,
            {
                "sliding_window": 5,
                "use_sliding_window": True,
                "max_window_layers": 0,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            (5, None),
        ),
        (LLAMA, {"layer_types": ["full_attention", "full_attention"]}, (None, None)),
    ],
)
def test_which_layers_slide(base: dict[str, Any], changes: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    assert spec_from_config({**base, **changes}).windows == windows


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        (None, 1000),
        ({"type": "linear", "factor": 4.0}, 1000),
        ({"type": "dynamic", "factor": 2.5}, 2500),
        ({"type": "dynamic", "factor": 0.5}, 1000),
        ({"type": "dynamic", "factor": 9e8}, 2**31),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1000}, 4000),  # Qwen2.5's instructions
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 250}, 1000),  # M extended already
        ({"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 250}, 1000),
        ({"type": "yarn", "factor": 4.0}, 4000),
        ({"type": "yarn", "original_max_position_embeddings": 300}, 1000),
        ({"type": "yarn", "factor": 1.1, "original_max_position_embeddings": 1000}, 1100),  # 1.1 * 1000 > 1100
        (
            {
                "type": "llama3",
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 500,
            },
            1000,
        ),
    ],
)
def test_context_length_counts_the_extension(scaling: dict[str, Any] | None, expected: int) -> None:
    spec = spec_from_config({**LLAMA, "max_position_embeddings": 1000, "rope_scaling": scaling})
    assert spec.context_length == spec.max_positions == expected
    assert spec.rope.max_positions == 1000
    assert spec.rope.depends_on_length is (scaling is not None and scaling["type"] == "dynamic")


def test_switches() -> None:
    assert spec_from_config(QWEN2).qkv_bias
    assert not spec_from_config(QWEN2).output_bias
    biased = spec_from_config({**LLAMA, "attention_bias": True})
    assert (biased.qkv_bias, biased.output_bias, biased.mlp_bias) == (True, True, False)
    assert not spec_from_config({**MISTRAL, "attention_bias": True}).qkv_bias  # transformers ignores the key there
    assert spec_from_config({**LLAMA, "num_key_value_heads": None}).kv_heads == 6
    assert spec_from_config({**LLAMA, "head_dim": 10}).head_dim == 10
    assert spec_from_config({**LLAMA, "head_dim": None}).head_dim == 4
    assert spec_from_config({**LLAMA, "head_dim": 10, "hidden_size": 25}).hidden_size == 25
    assert spec_from_config({key: value for key, value in LLAMA.items() if key != "model_type"}).family == "llama"
    assert spec_from_config({**QWEN2, "architectures": None}).family == "qwen2"


# ---- configurations that do not ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vocab_size", 0),
        ("vocab_size", "37"),
        ("vocab_size", True),
        ("vocab_size", 10**30),
        ("hidden_size", -24),
        ("hidden_size", 24.5),
        ("hidden_size", None),
        ("hidden_size", [24]),
        ("hidden_size", 25),
        ("intermediate_size", {}),
        ("num_hidden_layers", -1),
        ("num_hidden_layers", 10**9),
        ("num_attention_heads", 0),
        ("num_key_value_heads", 4),
        ("num_key_value_heads", 0),
        ("num_key_value_heads", 12),
        ("head_dim", 0),
        ("head_dim", 5),
        ("hidden_act", "mish"),
        ("hidden_act", 3),
        ("rms_norm_eps", 0.0),
        ("rms_norm_eps", -1e-6),
        ("rms_norm_eps", math.nan),
        ("rms_norm_eps", "1e-6"),
        ("max_position_embeddings", 0),
        ("max_position_embeddings", "long"),
        ("tie_word_embeddings", 1),
        ("attention_bias", "yes"),
        ("mlp_bias", None),
        ("rope_theta", 0),
        ("architectures", "LlamaForCausalLM"),
        ("architectures", [3]),
        ("model_type", 7),
        ("layer_types", ["full_attention"]),
        ("layer_types", "full_attention"),
    ],
)
def test_senseless_values_are_named(key: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=key) as caught:
        spec_from_config({**LLAMA, key: value}, "folder/config.json")
    message = str(caught.value)
    assert message.startswith("folder/config.json: ")
    assert "\n" not in message
    assert len(message) < 250
    if not isinstance(value, list):
        assert repr(value)[:57] in message


@pytest.mark.parametrize(
    "key", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
)
def test_missing_keys_are_named(key: str) -> None:
    config = {name: value for name, value in LLAMA.items() if name != key}
    with pytest.raises(CheckpointError, match=f"{key} is missing"):
        spec_from_config(config)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}, "mamba"),
        ({"model_type": "qwen9"}, "qwen9"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"architectures": ["LlamaModel"]}, "LlamaModel"),
        ({"model_type": None, "architectures": ["RwkvForCausalLM"]}, "RwkvForCausalLM"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ({"rope_scaling": {"rope_type": "mrope"}}, "mrope"),
    ],
)
def test_unsupported_models_say_what_is_supported(changes: dict[str, Any], names: str) -> None:
    with pytest.raises(UnsupportedError, match=names) as caught:
        spec_from_config({**LLAMA, **changes})
    if "model_type" in changes:
        assert all(family in str(caught.value) for family in FAMILIES)


def test_no_model_type_at_all() -> None:
    config = {key: value for key, value in LLAMA.items() if key not in ("model_type", "architectures")}
    with pytest.raises(CheckpointError, match='model_type is missing.*add it, for example "model_type": "bert"'):
        spec_from_config(config)


def test_sliding_layers_without_a_window() -> None:
    with pytest.raises(CheckpointError, match="layer_types"):
        spec_from_config({**QWEN2, "layer_types": ["full_attention", "sliding_attention"]})
    with pytest.raises(CheckpointError, match="sliding_window is 0"):
        spec_from_config({**MISTRAL, "sliding_window": 0})


# ---- sets of tensors -----------------------------------------------------------------------------------------------


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


# ---- tied embeddings -----------------------------------------------------------------------------------------------


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


# ---- what load and forward promise ---------------------------------------------------------------------------------


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
