"""Configurations of tiny decoders with experts, or with latent attention."""

from __future__ import annotations

from typing import Any

from decoder_config_parts import EXPERTS, FULL, HEADS, LONGROPE, SLIDING, TEMPERED, YARN

# Keys of 12 features of which 4 turn, values of 10; several experts in 3 groups.
LATENT = {
    "num_key_value_heads": 6,
    "kv_lora_rank": 20,
    "q_lora_rank": 28,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
}
GROUPS = {
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_group": 3,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
    "first_k_dense_replace": 1,
}
MSCALED = {**YARN, "mscale": 0.7, "mscale_all_dim": 0.9}

MODEL_TYPES = {
    "Qwen3Moe": "qwen3_moe",
    "Qwen2Moe": "qwen2_moe",
    "Glm4Moe": "glm4_moe",
    "MiniMaxM2": "minimax_m2",
    "GptOss": "gpt_oss",
    "DeepseekV2": "deepseek_v2",
    "DeepseekV3": "deepseek_v3",
    "Glm4MoeLite": "glm4_moe_lite",
}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-moe": ("Qwen3Moe", {**HEADS, **EXPERTS, "norm_topk_prob": True}),
    "qwen3-moe-stepped": (
        "Qwen3Moe",
        {**EXPERTS, "decoder_sparse_step": 2, "head_dim": 10, "use_sliding_window": True, "sliding_window": 7},
    ),
    "mixtral": ("Mixtral", {**HEADS, "num_local_experts": 5, "num_experts_per_tok": 2}),
    "mixtral-window": ("Mixtral", {**HEADS, "num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": 7}),
    "qwen2-moe": ("Qwen2Moe", {**EXPERTS, "shared_expert_intermediate_size": 40, "mlp_only_layers": [1]}),
    "glm4-moe": (
        "Glm4Moe",
        {
            **HEADS,
            "n_routed_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "n_group": 3,
            "topk_group": 2,
            "routed_scaling_factor": 1.5,
            "use_qk_norm": True,
            "attention_bias": True,
        },
    ),
    "minimax-m2": ("MiniMaxM2", {**HEADS, "num_local_experts": 5, "num_experts_per_tok": 2, "rotary_dim": 4}),
    "gpt-oss": (
        "GptOss",
        {
            **HEADS,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "sliding_window": 7,
            "swiglu_limit": 1.5,
            "rope_parameters": {**YARN, "truncate": False},
        },
    ),
    "gpt-oss-no-biases": (
        "GptOss",
        {
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 3,
            "attention_bias": False,
            "layer_types": [FULL, FULL, SLIDING],
            "sliding_window": 5,
        },
    ),
    "granitemoe": (
        "GraniteMoe",
        {
            "num_local_experts": 5,
            "embedding_multiplier": 3.0,
            "logits_scaling": 4.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.5,
        },
    ),
    "deepseek-v2": ("DeepseekV2", {**LATENT, **GROUPS, "topk_method": "group_limited_greedy", "attention_bias": True}),
    "deepseek-v2-lite": (
        "DeepseekV2",
        {**LATENT, **GROUPS, "q_lora_rank": None, "topk_method": "greedy", "rope_parameters": MSCALED},
    ),
    "deepseek-v3": ("DeepseekV3", {**LATENT, **GROUPS, "attention_bias": True, "rope_parameters": MSCALED}),
    "glm4-moe-lite": (
        "Glm4MoeLite",
        {
            **LATENT,
            **GROUPS,
            "v_head_dim": 12,
            "q_lora_rank": None,
            "mlp_layer_types": ["sparse", "dense", "sparse"],
            "first_k_dense_replace": None,
        },
    ),
    "youtu": ("Youtu", {**LATENT, "attention_bias": True}),
    "minicpm3": ("MiniCPM3", {**LATENT, "mlp_bias": True, "attention_bias": True}),
    "minicpm3-longrope": (
        "MiniCPM3",
        {
            **LATENT,
            "qk_rope_head_dim": 8,
            "tie_word_embeddings": False,
            "original_max_position_embeddings": 32,
            "rope_parameters": LONGROPE,
        },
    ),
    "mistral4": (
        "Mistral4",
        {
            **LATENT,
            **{key: value for key, value in GROUPS.items() if "group" not in key},
            "rope_parameters": {**TEMPERED, "partial_rotary_factor": 4 / 12},
        },
    ),
    "olmoe": ("Olmoe", {"num_experts": 5, "num_experts_per_tok": 2}),
}
