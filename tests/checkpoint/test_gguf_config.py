"""The config made from a GGUF file's metadata, and the RoPE scaling found in its keys and tensors."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_model_cases import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    MLP,
    VOCAB,
    Array,
    Model,
    config_of,
)

from kbit.checkpoint.gguf.keys import short_float
from kbit.checkpoint.gguf.rope import llama3_divisors, llama3_from_divisors
from kbit.checkpoint.gguf.source import GGUFSource
from kbit.models.families import spec_from_config
from kbit.models.rope import inverse_frequencies


def test_llama_config(tmp_path: Path) -> None:
    def edit(model: Model) -> None:
        model.general |= {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}

    assert config_of(tmp_path, edit=edit) == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "max_position_embeddings": 128,
        "vocab_size": VOCAB,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def test_qwen2_config(tmp_path: Path) -> None:
    config = config_of(tmp_path, "qwen2", tied=False, biases=("attn_q", "attn_k", "attn_v"))
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    assert config["model_type"] == "qwen2"
    assert config["attention_bias"] is True
    assert config["tie_word_embeddings"] is False


def test_a_sliding_window_makes_it_mistral(tmp_path: Path) -> None:
    config = config_of(tmp_path, edit=lambda model: model.keys.update({"attention.sliding_window": 64}))
    assert (config["model_type"], config["architectures"]) == ("mistral", ["MistralForCausalLM"])
    assert config["sliding_window"] == 64


def test_optional_keys_have_llama_cpps_defaults(tmp_path: Path) -> None:
    def edit(model: Model) -> None:
        del model.keys["vocab_size"], model.keys["rope.freq_base"]
        model.keys["attention.head_count"] = [HEADS] * LAYERS  # per layer, all equal

    config = config_of(tmp_path, edit=edit)
    assert config["vocab_size"] == VOCAB
    assert config["rope_theta"] == 10000.0
    assert config["num_attention_heads"] == HEADS


@pytest.mark.parametrize("value", [1e-5, 1e-6, 500000.0, 0.1, 1.0, 9.3e-7, 3.4e38])
def test_float32_values_come_back_as_written_in_the_config(value: float) -> None:
    stored = struct.unpack("<f", struct.pack("<f", value))[0]
    assert short_float(stored) == value
    assert short_float(0.1 + 1e-12) == 0.1 + 1e-12  # a float64 is left alone


ROPE_KEYS: list[tuple[dict[str, Any], dict[str, Any] | None]] = [
    ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
    ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    ({"rope.scaling.factor": 2.0}, {"rope_type": "linear", "factor": 2.0}),
    ({"rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
    ({"rope.scaling.type": "linear", "rope.scaling.factor": 1.0}, None),
    (
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    ),
    (
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.yarn_beta_fast": 16.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 16.0},
    ),
    (
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.attn_factor": 0.5},
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 128,
            "attention_factor": 0.5 * (0.1 * np.log(4.0) + 1.0),
        },
    ),
]


@pytest.mark.parametrize(("keys", "expected"), ROPE_KEYS)
def test_rope_scaling_from_keys(tmp_path: Path, keys: dict[str, Any], expected: dict[str, Any] | None) -> None:
    assert config_of(tmp_path, edit=lambda model: model.keys.update(keys))["rope_scaling"] == expected


def converter_rope_freqs(dim: int, theta: float, factor: float, low: float, high: float, original: int) -> Array:
    """rope_freqs.weight as llama.cpp's converter computes it (float32 frequencies, float64 arithmetic after that)."""
    freqs = 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    values = []
    for freq in freqs.tolist():
        wavelength = 2 * np.pi / freq
        if wavelength < original / high:
            values.append(1.0)
        elif wavelength > original / low:
            values.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            values.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(values, dtype=np.float32)


@pytest.mark.parametrize(
    ("dim", "theta", "factor", "low", "high", "original"),
    [
        (128, 500000.0, 8.0, 1.0, 4.0, 8192),  # Llama 3.1
        (64, 500000.0, 32.0, 1.0, 4.0, 8192),  # Llama 3.2 1B
        (128, 500000.0, 16.0, 2.0, 6.0, 8192),
        (128, 10000.0, 4.0, 1.5, 9.5, 8192),
    ],
)
def test_llama3_scaling_is_recovered(
    dim: int, theta: float, factor: float, low: float, high: float, original: int
) -> None:
    divisors = converter_rope_freqs(dim, theta, factor, low, high, original)
    found = llama3_from_divisors(divisors.tolist(), dim, theta, original)
    assert found == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def test_llama3_scaling_gives_transformers_frequencies() -> None:
    """Independent: transformers' own llama3 rule, fed the recovered parameters, divides by the stored divisors.
    Tolerance: both sides hold float32 frequencies and divisors, a few eps each, times the factor (see
    llama3_from_divisors)."""
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    transformers = pytest.importorskip("transformers")
    stored = converter_rope_freqs(128, 500000.0, 8.0, 1.0, 4.0, 8192)
    found = llama3_from_divisors(stored.tolist(), 128, 500000.0, 8192)
    config = transformers.LlamaConfig(
        hidden_size=1024, num_attention_heads=8, rope_theta=500000.0, rope_scaling=found, max_position_embeddings=131072
    )
    theirs, attention = rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1.0 / (500000.0 ** (torch.arange(0, 128, 2, dtype=torch.float32) / 128))
    assert attention == 1.0
    np.testing.assert_allclose(plain.numpy() / stored, theirs.numpy(), rtol=64 * 2.0**-23 * 8)


def test_rope_freqs_tensor_becomes_llama3_scaling(tmp_path: Path) -> None:
    """With an unstated original context, 8192 stands in: only ratios to it matter."""

    def edit(model: Model) -> None:
        model.keys |= {"rope.freq_base": 500000.0, "attention.key_length": 32, "attention.value_length": 32}
        for layer in range(LAYERS):
            for part, heads in (("attn_q", HEADS), ("attn_k", KV_HEADS), ("attn_v", KV_HEADS)):
                model.stored[f"blk.{layer}.{part}.weight"] = (np.zeros((heads * 32, HIDDEN), np.float32), None)
            model.stored[f"blk.{layer}.attn_output.weight"] = (np.zeros((HIDDEN, HEADS * 32), np.float32), None)
        freqs = converter_rope_freqs(32, 500000.0, 8.0, 1.0, 4.0, 8192)
        model.stored["rope_freqs.weight"] = (freqs, None)

    model = Model()
    edit(model)
    source = GGUFSource(model.write(tmp_path / "m.gguf"))
    assert source.config["rope_scaling"]["rope_type"] == "llama3"
    expected = converter_rope_freqs(32, 500000.0, 8.0, 1.0, 4.0, 8192)
    scaling = {name: value for name, value in source.config["rope_scaling"].items() if name != "rope_type"}
    again = llama3_divisors(
        32,
        500000.0,
        scaling["factor"],
        scaling["low_freq_factor"],
        scaling["high_freq_factor"],
        scaling["original_max_position_embeddings"],
    )
    np.testing.assert_allclose(again, expected, rtol=64 * 2.0**-23 * 8)
    assert not any("rope" in name for name in source.tensors)


def test_rope_freqs_of_another_rule_are_taken_as_they_are(tmp_path: Path) -> None:
    """They divide the frequencies of every text, up to the whole context, which is not longer for them."""
    stored = np.linspace(1.5, 7.25, HEAD_DIM // 2).astype(np.float32)

    def edit(model: Model) -> None:
        model.stored["rope_freqs.weight"] = (stored, None)

    spec = spec_from_config(config_of(tmp_path, edit=edit))
    assert spec.longest_in_pieces == spec.context_length == 128
    plain = 10000.0 ** -(np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    for length in (1, 128):
        found = inverse_frequencies(spec.rope, np.array([length]))
        np.testing.assert_allclose(found, (plain / stored)[None], rtol=4 * 2.0**-23)


def test_rope_freqs_of_ones_change_nothing(tmp_path: Path) -> None:
    def edit(model: Model) -> None:
        model.stored["rope_freqs.weight"] = (np.ones(HEAD_DIM // 2, np.float32), None)

    assert config_of(tmp_path, edit=edit)["rope_scaling"] is None
