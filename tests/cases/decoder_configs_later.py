"""Configurations of tiny decoders of families that came later: changes to TINY, by the name of a case."""

from __future__ import annotations

from typing import Any

SLIDING, FULL = "sliding_attention", "full_attention"
EXPERTS = {"moe_intermediate_size": 24, "num_experts_per_tok": 2, "n_routed_experts": 6, "n_shared_experts": 2}

MODEL_TYPES = {"InternLM3": "internlm3", "SolarOpen": "solar_open", "Ernie4_5_Moe": "ernie4_5_moe"}
MODEL_TYPES |= {"GraniteMoeShared": "granitemoeshared"}

# Llama's class, with its own configuration.
CLASSES = {"InternLM3": "LlamaForCausalLM"}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "olmo": ("Olmo", {"attention_bias": True}),
    "helium": ("Helium", {"head_dim": 8, "attention_bias": True, "mlp_bias": True}),
    "internlm3": ("InternLM3", {"head_dim": 8, "attention_bias": True, "mlp_bias": True}),
    "cohere2": ("Cohere2", {"sliding_window": 7, "layer_types": [SLIDING, FULL, SLIDING], "logit_scale": 0.5}),
    "cohere2-period": ("Cohere2", {"sliding_window": 7, "num_hidden_layers": 5, "attention_bias": True}),
    "dots1": (
        "Dots1",
        {
            **EXPERTS,
            "first_k_dense_replace": 1,
            "n_group": 3,
            "topk_group": 2,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "sliding_window": 9,
            "max_window_layers": 2,
            "head_dim": 8,
        },
    ),
    "solar-open": ("SolarOpen", {**EXPERTS, "head_dim": 8, "attention_bias": True}),
    "ernie4_5-moe": (
        "Ernie4_5_Moe",
        {
            "moe_intermediate_size": 24,
            "moe_num_experts": 5,
            "moe_k": 2,
            "moe_num_shared_experts": 2,
            "head_dim": 8,
            "use_bias": True,
        },
    ),
    "ernie4_5-moe-range": (
        "Ernie4_5_Moe",
        {
            "moe_intermediate_size": 24,
            "moe_num_experts": 5,
            "moe_k": 2,
            "moe_num_shared_experts": 0,
            "num_hidden_layers": 5,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": 3,
            "moe_layer_interval": 2,
        },
    ),
    "granitemoe-shared": (
        "GraniteMoeShared",
        {"num_local_experts": 5, "shared_intermediate_size": 40, "attention_multiplier": 0.5, "logits_scaling": 4.0},
    ),
    "afmoe": (
        "Afmoe",
        {
            "moe_intermediate_size": 24,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "num_shared_experts": 2,
            "num_hidden_layers": 4,
            "sliding_window": 7,
            "head_dim": 8,
            "route_scale": 2.5,
            "mup_enabled": True,
        },
    ),
    "falcon-rw": (
        "Falcon",
        {
            "alibi": True,
            # (transformers 5.23 adds the slopes twice in its own loop of attention, with the mask and to scores.)
            "attn_implementation": "sdpa",
            "multi_query": False,
            "parallel_attn": False,
            "bias": True,
            "num_attention_heads": 4,
            "num_kv_heads": 4,
            "num_key_value_heads": 4,
            "ffn_hidden_size": 77,
            "max_position_embeddings": 64,
        },
    ),
}
