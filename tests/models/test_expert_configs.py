"""Configurations of mixtures of experts, latent attention and short convolutions, as the hub writes them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from config_cases import mixture, spec
from decoder_cases import TEMPERED

from kbit.graph.experts import Clamp
from kbit.host.errors import CheckpointError, KbitError, UnsupportedError

transformers = pytest.importorskip("transformers")


def test_numbers_of_experts_under_either_name() -> None:
    """transformers 5 writes num_local_experts where the hub's files have num_experts."""
    for family in ("qwen3_moe", "gpt_oss", "mixtral", "minimax_m2", "olmoe"):
        for key in ("num_experts", "num_local_experts"):
            assert mixture(family, **{key: 12}).routing.experts == 12
    with pytest.raises(CheckpointError, match="num_local_experts is 7; it should be num_experts, 8"):
        spec("qwen3_moe", num_experts=8, num_local_experts=7)


def test_which_layers_have_experts() -> None:
    stepped = {"num_experts": 8, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    assert mixture("qwen3_moe", **stepped).layers == (False, True, False, False, False, True, False)
    assert mixture("glm4_moe", first_k_dense_replace=5).layers == (False,) * 5 + (True,) * 2
    assert spec("glm4_moe", first_k_dense_replace=7).experts is None
    with pytest.raises(CheckpointError, match=r"mlp_only_layers is \[7\]; it should be a list of layers"):
        spec("qwen2_moe", mlp_only_layers=[7])


def test_which_groups_take_part() -> None:
    """DeepSeek-V2 says by which method; without it, groups mean nothing."""
    grouped = {"num_experts_per_tok": 2, "n_routed_experts": 8, "n_group": 4, "topk_group": 2}
    found = mixture("deepseek_v2", **grouped, topk_method="group_limited_greedy").routing
    assert (found.groups, found.chosen_groups, found.group_score) == (4, 2, "best")
    assert mixture("deepseek_v2", **grouped, topk_method="greedy").routing.groups == 1
    with pytest.raises(CheckpointError, match="topk_method is 'noaux_tc'; it should be one of greedy"):
        spec("deepseek_v2", **grouped, topk_method="noaux_tc")
    assert mixture("deepseek_v3").routing.group_score == "two best"
    layers = ["dense", "sparse", "dense", *["sparse"] * 4]
    assert mixture("glm4_moe_lite", mlp_layer_types=layers).layers == tuple(kind == "sparse" for kind in layers)
    assert mixture("glm4_moe_lite").layers == (False, *[True] * 6)
    with pytest.raises(CheckpointError, match="first_k_dense_replace is 2; it should be as mlp_layer_types says"):
        spec("glm4_moe_lite", first_k_dense_replace=2)


def test_latent_attention() -> None:
    """Sizes, the temperature in the scores' scale, and what is refused."""
    assert spec("kimi_k2", n_group=1, topk_group=1) == replace(
        spec("deepseek_v3", n_group=1, topk_group=1), family="kimi_k2"
    )
    found = spec("youtu", q_lora_rank=None, v_head_dim=48)
    assert found.latent is not None
    assert (found.head_dim, found.rope.dim, found.latent.query_rank, found.value_dim) == (192, 64, 0, 48)
    scaling = {
        "type": "yarn",
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
        "original_max_position_embeddings": 4096,
    }
    found = spec("deepseek_v3", rope_scaling=scaling)
    # 0.1 c ln s + 1, squared.
    assert found.attention_scale == pytest.approx(192**-0.5 * (0.05 * math.log(40) + 1) ** 2)
    assert found.rope.attention_factor == pytest.approx((0.1 * math.log(40) + 1) / (0.05 * math.log(40) + 1))
    for family, changes, message in (
        ("youtu", {"v_head_dim": 193}, "v_head_dim 193 is not supported; it must be at most"),
        ("youtu", {"num_key_value_heads": 16}, "num_key_value_heads 16 is not supported for latent attention"),
        ("youtu", {"rope_interleave": False}, "rope_interleave False is not supported"),
        ("deepseek_v3", {"index_topk": 2048}, "index_topk 2048 is not supported for model_type 'deepseek_v3'"),
        ("deepseek_v2", {"norm_topk_prob": True, "num_experts_per_tok": 6}, "norm_topk_prob True is not supported"),
        ("llama", {"kv_lora_rank": 512}, "kv_lora_rank 512 is not supported for model_type 'llama'"),
        (
            "mistral4",
            {"rope_parameters": {**TEMPERED, "partial_rotary_factor": 0.25}},
            "turns 32 feat",
        ),
    ):
        with pytest.raises(KbitError, match=message):
            spec(family, **changes)
    for unknown in ("deepseek_v32", "deepseek_v4"):
        with pytest.raises(UnsupportedError, match=f"model_type '{unknown}' is not supported"):
            spec(unknown)


def test_lfm2_as_the_hub_has_it() -> None:
    """Older names of keys, and layers that attend by their numbers; the width of an MLP is adjusted."""
    published = {
        "block_ff_dim": 300, "block_auto_adjust_ff_dim": True, "block_ffn_dim_multiplier": 1.5, "block_multiple_of": 64,
        "full_attn_idxs": [2, 5], "tie_embedding": False, "conv_L_cache": 4, "intermediate_size": 999,
    }  # fmt: skip
    found = spec("lfm2", **published)
    assert found.intermediate_size == 320  # 300 2/3 1.5, and then the next multiple
    assert not found.tied_embeddings
    assert found.conv is not None
    assert found.attention_layers == (2, 5)
    assert [state.shape for state in found.states] == [(3, 256)] * 5
    assert spec("lfm2").conv is None  # where nothing says which layers attend, all do
    assert spec("lfm2", **published, block_use_swiglu=True).conv == found.conv
    for changes, message in (
        ({"full_attn_idxs": [7]}, "full_attn_idxs is .*numbers from 0 to 6"),
        ({"layer_types": ["conv"] * 6 + ["mamba"]}, "layer_types has 'mamba', which kbit does not support"),
        ({"conv_L_cache": 1}, "conv_L_cache is 1; it should be a whole number from 2"),
    ):
        with pytest.raises(KbitError, match=message):
            spec("lfm2", **{**published, **changes})
    added = mixture("lfm2_moe", use_expert_bias=False, num_dense_layers=3)
    assert (added.selection_bias, added.layers) == (False, (False,) * 3 + (True,) * 4)


def test_minimax_as_the_hub_has_it() -> None:
    """Keys of its own code, which say what is always so here; half of each head turns."""
    published = {
        "scoring_func": "sigmoid", "use_qk_norm": True, "qk_norm_type": "per_layer", "use_routing_bias": True,
        "shared_intermediate_size": 0, "rotary_dim": 4, "head_dim": 8, "num_mtp_modules": 3, "sliding_window": None,
    }  # fmt: skip
    found = spec("minimax_m2", **published)
    assert found.rope.dim == 4
    assert found.experts is not None
    assert found.experts.routing.score == "sigmoid"
    for key, other in (("scoring_func", "softmax"), ("use_qk_norm", False), ("shared_intermediate_size", 64)):
        with pytest.raises(UnsupportedError, match=f"{key} .* is not supported for model_type 'minimax_m2', only"):
            spec("minimax_m2", **{**published, key: other})
    with pytest.raises(CheckpointError, match="rotary_dim is 9; it should be a whole number from 2 to 8"):
        spec("minimax_m2", **{**published, "rotary_dim": 9})


def test_gpt_oss_as_the_hub_has_it() -> None:
    """The older spelling of its rotation; the clamp of its gate."""
    scaling = {
        "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
        "rope_type": "yarn", "truncate": False,
    }  # fmt: skip
    published = {"rope_theta": 150000, "rope_scaling": scaling, "swiglu_limit": 7.0, "experts_per_token": 4}
    assert spec("gpt_oss", **published) == spec("gpt_oss")
    assert not spec("gpt_oss").rope.truncate
    assert mixture("gpt_oss", swiglu_limit=5.0).clamp == Clamp(1.702, 5.0)
    assert spec("gpt_oss").windows == (128, None, 128, None, 128, None, 128)


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("llama", "num_local_experts", 8),
        ("llama", "n_routed_experts", 8),
        ("qwen3_moe", "shared_expert_intermediate_size", 64),
        ("qwen3_moe", "n_group", 2),
        ("mixtral", "routed_scaling_factor", 2.5),
        ("mixtral", "scoring_func", "sigmoid"),
        ("olmoe", "clip_qkv", 8.0),
        ("olmoe", "first_k_dense_replace", 1),
        ("granitemoe", "swiglu_limit", 7.0),
    ],
)
def test_keys_of_other_mixtures_are_refused(family: str, key: str, value: object) -> None:
    spec(family)
    with pytest.raises(UnsupportedError, match=f"{key} .* is not supported for model_type '{family}'"):
        spec(family, **{key: value})


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("mixtral", {"num_local_experts": 0}, "num_local_experts is 0; it should be a whole number from 1"),
        ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok is 9; it should be a whole number from 1 to 8"),
        ("glm4_moe", {"n_group": 5}, "n_group is 5; it should be a divisor of the 128 experts"),
        ("glm4_moe", {"n_group": 64, "topk_group": 2}, "topk_group is 2; it should be more, as 8 experts"),
        ("qwen3_moe", {"norm_topk_prob": 1}, "norm_topk_prob is 1; it should be true or false"),
        ("gpt_oss", {"swiglu_alpha": 0}, "swiglu_alpha is 0; it should be a number above"),
        ("qwen2_moe", {"use_sliding_window": True}, "use_sliding_window without layer_types is not supported"),
    ],
)
def test_senseless_experts(family: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(KbitError, match=message):
        spec(family, **changes)
