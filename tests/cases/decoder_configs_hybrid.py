"""Configurations of tiny decoders whose layers are of several kinds: beside each other, or one of them each."""

from __future__ import annotations

from typing import Any

from decoder_config_parts import EXPERTS, FULL, HEADS

MULTIPLIED = {
    "embedding_multiplier": 3.0,
    "lm_head_multiplier": 0.4,
    "mlp_multipliers": [0.7, 0.6],
    "key_multiplier": 0.5,
    "attention_in_multiplier": 1.3,
    "attention_out_multiplier": 0.8,
    "ssm_multipliers": [0.6, 1.5, 0.7, 0.8, 0.4],
    "ssm_in_multiplier": 1.2,
    "ssm_out_multiplier": 0.5,
}
FALCON_H1 = {"mamba_n_heads": 4, "mamba_d_state": 12, "mamba_d_head": 16, "mamba_d_ssm": 64}
NEMOTRON_H = {
    "head_dim": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 12,
    "ssm_state_size": 10,
    "n_groups": 2,
    "conv_kernel": 3,
    "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 20,
    "n_routed_experts": 6,
}
MAMBA, MOE, MLP = "linear_attention", "moe", "mlp"
LINEAR, CONV = "linear_attention", "conv"
QUARTER = {"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.25}
# 2 heads of keys for 6 of values, whose features are more than 32 and no multiple of 16.
DELTA = {
    "head_dim": 16,
    "layer_types": [LINEAR, FULL, LINEAR],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 36,
    "linear_conv_kernel_dim": 4,
    "rope_parameters": QUARTER,
}

# Heads whose features are more than 32 and no multiple of 16.
SCAN = {"mamba_n_heads": 2, "mamba_d_state": 12, "mamba_d_head": 48}
GRANITE = {
    "embedding_multiplier": 3.0,
    "logits_scaling": 4.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.5,
    "shared_intermediate_size": 40,
}

MODEL_TYPES = {
    "FalconH1": "falcon_h1",
    "NemotronH": "nemotron_h",
    "Lfm2Moe": "lfm2_moe",
    "GraniteMoeHybrid": "granitemoehybrid",
    "Qwen3Next": "qwen3_next",
    "Qwen3_5": "qwen3_5_text",
    "Qwen3_5Moe": "qwen3_5_moe_text",
}
CONFIGS = {"Qwen3_5": "Qwen3_5Text", "Qwen3_5Moe": "Qwen3_5MoeText"}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon-h1": ("FalconH1", {**FALCON_H1, **MULTIPLIED}),
    "falcon-h1-norm": (
        "FalconH1",
        {
            **FALCON_H1,
            "mamba_n_groups": 2,
            "mamba_rms_norm": True,
            "mamba_norm_before_gate": False,
            "mamba_conv_bias": False,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "nemotron-h": ("NemotronH", {**NEMOTRON_H, "layers_block_type": [MAMBA, MLP, FULL, MLP, MAMBA]}),
    "nemotron-h-moe": (
        "NemotronH",
        {
            **NEMOTRON_H,
            "layers_block_type": [MAMBA, MOE, FULL, MOE],
            "n_group": 3,
            "topk_group": 2,
            "routed_scaling_factor": 2.5,
        },
    ),
    "nemotron-h-mixed": (
        "NemotronH",
        {
            **NEMOTRON_H,
            "layers_block_type": [FULL, MLP, MOE, MAMBA],
            "norm_topk_prob": False,
            "use_conv_bias": False,
            "mlp_bias": True,
            "n_groups": 1,
            "num_key_value_heads": 3,
        },
    ),
    "lfm2": (
        "Lfm2",
        {**HEADS, "layer_types": [CONV, FULL, CONV], "block_auto_adjust_ff_dim": True, "block_multiple_of": 11},
    ),
    "lfm2-biases": (
        "Lfm2",
        {
            **HEADS,
            "layer_types": [FULL, CONV, CONV],
            "block_auto_adjust_ff_dim": False,
            "conv_bias": True,
            "conv_L_cache": 5,
            "tie_word_embeddings": False,
        },
    ),
    "lfm2-moe": ("Lfm2Moe", {**HEADS, **EXPERTS, "layer_types": [CONV, CONV, FULL], "num_dense_layers": 1}),
    "granite-hybrid": (
        "GraniteMoeHybrid",
        {**GRANITE, **SCAN, "num_local_experts": 0, "layer_types": [LINEAR, FULL, LINEAR]},
    ),
    "granite-hybrid-moe": (
        "GraniteMoeHybrid",
        {
            **GRANITE,
            **SCAN,
            "intermediate_size": 24,
            "num_local_experts": 5,
            "layer_types": [LINEAR, LINEAR, FULL],
            "position_embedding_type": "rope",
            "attention_bias": True,
            "mamba_conv_bias": False,
        },
    ),
    "bamba": ("Bamba", {**SCAN, "mamba_n_heads": 6, "mamba_d_head": 16, "attn_layer_indices": [0], "mlp_bias": True}),
    "qwen3-next": (
        "Qwen3Next",
        {**DELTA, **EXPERTS, "shared_expert_intermediate_size": 40, "decoder_sparse_step": 2, "norm_topk_prob": False},
    ),
    "qwen3_5": ("Qwen3_5", DELTA),
    "qwen3_5-biases": (
        "Qwen3_5",
        {
            **DELTA,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "linear_num_value_heads": 2,
            "linear_conv_kernel_dim": 3,
            "rope_parameters": {**QUARTER, "mrope_section": [1, 1, 0], "mrope_interleaved": True},
        },
    ),
    "qwen3_5-moe": ("Qwen3_5Moe", {**DELTA, **EXPERTS, "shared_expert_intermediate_size": 40}),
}
