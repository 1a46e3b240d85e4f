"""Configurations become specs; bad ones become errors that name key and value."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from config_cases import LLAMA, MISTRAL, QWEN2

from kbit.host.errors import CheckpointError, UnsupportedError
from kbit.models.families import FAMILIES, spec_from_config


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
