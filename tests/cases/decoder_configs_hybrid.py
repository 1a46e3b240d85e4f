"""Configurations of tiny decoders whose layers are of several kinds: beside each other, or one of them each."""

from __future__ import annotations

from typing import Any

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
MAMBA, MOE, MLP, FULL = "linear_attention", "moe", "mlp", "full_attention"

MODEL_TYPES = {"FalconH1": "falcon_h1", "NemotronH": "nemotron_h"}

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
}
