"""Weights of published models, from their configurations: what their pages say that they have, in billions."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest

from kbit.models.families import spec_from_config
from kbit.models.params import parameters
from kbit.planner.weights import parameters as planned
from kbit.planner.weights import planned_weights

_YARN = {"type": "yarn", "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096}
_V3 = {
    "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432,
    "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128,
    "n_shared_experts": 1, "n_routed_experts": 256, "routed_scaling_factor": 2.5, "kv_lora_rank": 512,
    "q_lora_rank": 1536, "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128, "topk_method": "noaux_tc",
    "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8, "moe_layer_freq": 1, "first_k_dense_replace": 3,
    "norm_topk_prob": True, "scoring_func": "sigmoid", "rope_scaling": _YARN, "num_nextn_predict_layers": 1,
}  # fmt: skip
# As the first files say it: how often queries are tempered in a number, and no list of layers that rotate.
_LLAMA4 = {
    "model_type": "llama4_text", "vocab_size": 202048, "hidden_size": 5120, "intermediate_size": 8192,
    "intermediate_size_mlp": 16384, "num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8,
    "num_local_experts": 16, "attn_temperature_tuning": 4, "no_rope_layers": [], "max_position_embeddings": 10485760,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 16.0, "high_freq_factor": 1.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
_ATTENDING = (2, 6, 10, 14, 18, 21)

# Configuration; all weights, and those that a token goes through.
MODELS: dict[str, tuple[dict[str, Any], float, float | None]] = {
    "DeepSeek-V2-Lite": (
        {
            "model_type": "deepseek_v2", "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944,
            "moe_intermediate_size": 1408, "num_hidden_layers": 27, "num_attention_heads": 16, "n_shared_experts": 2,
            "n_routed_experts": 64, "q_lora_rank": None, "topk_method": "greedy", "n_group": 1, "topk_group": 1,
            "num_experts_per_tok": 6, "first_k_dense_replace": 1,
            "rope_scaling": {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
        },
        15.7,
        None,
    ),
    "DeepSeek-V3": (_V3, 671.0, None),
    "Kimi-K2": (
        {
            **_V3, "model_type": "kimi_k2", "vocab_size": 163840, "num_attention_heads": 64, "num_key_value_heads": 64,
            "n_routed_experts": 384, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
        },
        1026.4,
        None,
    ),
    "MiniCPM3-4B": (
        {
            "model_type": "minicpm3", "vocab_size": 73448, "hidden_size": 2560, "intermediate_size": 6400,
            "num_hidden_layers": 62, "num_attention_heads": 40,
        },
        4.1,
        None,
    ),
    "LFM2-1.2B": (
        {
            "model_type": "lfm2", "vocab_size": 65536, "hidden_size": 2048, "block_ff_dim": 12288,
            "num_hidden_layers": 16, "num_attention_heads": 32, "full_attn_idxs": [2, 5, 8, 10, 12, 14],
        },
        1.2,
        None,
    ),
    "LFM2-8B-A1B": (
        {
            "model_type": "lfm2_moe", "vocab_size": 65536, "hidden_size": 2048, "num_hidden_layers": 24,
            "num_attention_heads": 32,
            "layer_types": ["full_attention" if layer in _ATTENDING else "conv" for layer in range(24)],
        },
        8.3,
        1.6,
    ),
    "Granite-4.0-H-Tiny": (
        {
            "model_type": "granitemoehybrid", "vocab_size": 100352, "hidden_size": 1536, "intermediate_size": 512,
            "shared_intermediate_size": 1024, "num_hidden_layers": 40, "num_attention_heads": 12,
            "num_key_value_heads": 4, "num_local_experts": 64, "num_experts_per_tok": 6, "mamba_n_heads": 48,
            "mamba_d_state": 128, "tie_word_embeddings": True, "position_embedding_type": "nope",
            "layer_types": ["attention" if layer % 10 == 5 else "mamba" for layer in range(40)],
        },
        6.9,
        1.5,
    ),
    "Phi-3.5-MoE": (
        {
            "model_type": "phimoe", "architectures": ["PhiMoEForCausalLM"], "vocab_size": 32064, "hidden_size": 4096,
            "intermediate_size": 6400, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
            "num_local_experts": 16, "num_experts_per_tok": 2, "attention_bias": True, "lm_head_bias": True,
            "sliding_window": 131072, "original_max_position_embeddings": 4096, "input_jitter_noise": 0.01,
            "rope_scaling": {
                "type": "longrope", "short_factor": [1.0] * 64, "long_factor": [1.5] * 64, "short_mscale": 1.2431,
                "long_mscale": 1.2431, "original_max_position_embeddings": 4096,
            },
        },
        41.9,
        6.6,
    ),
    # Of 109 and 400 billion a part is what sees.
    "Llama-4-Scout": (_LLAMA4, 107.8, 17.2),
    "Llama-4-Maverick": (
        {**_LLAMA4, "num_local_experts": 128, "interleave_moe_layer_step": 2, "use_qk_norm": False},
        400.7,
        17.2,
    ),
    "BitNet-b1.58-2B-4T": (
        {
            "model_type": "bitnet", "vocab_size": 128256, "hidden_size": 2560, "intermediate_size": 6912,
            "num_hidden_layers": 30, "num_attention_heads": 20, "num_key_value_heads": 5, "tie_word_embeddings": True,
        },
        2.4,
        None,
    ),
    "Apertus-8B": (
        {
            "model_type": "apertus", "vocab_size": 131072, "hidden_size": 4096, "intermediate_size": 21504,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_act": "xielu",
            "qk_norm": True, "post_norm": False, "mlp_bias": False,
        },
        8.1,
        None,
    ),
    "OPT-350M": (
        {
            "model_type": "opt", "vocab_size": 50272, "hidden_size": 1024, "ffn_dim": 4096, "num_hidden_layers": 24,
            "num_attention_heads": 16, "word_embed_proj_dim": 512, "do_layer_norm_before": False,
            "_remove_final_layer_norm": False,
        },
        0.3,
        None,
    ),
    "Bamba-9B": (
        {
            "model_type": "bamba", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
            "num_hidden_layers": 32, "num_attention_heads": 32, "attn_layer_indices": [9, 18, 27], "mamba_d_state": 128,
        },
        9.8,
        None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_published_totals(name: str) -> None:
    config, total, active = MODELS[name]
    spec = spec_from_config(config)
    declared = parameters(spec)
    assert planned(planned_weights(spec, "fp16")) == sum(prod(parameter.shape) for parameter in declared)
    assert round(sum(prod(parameter.shape) for parameter in declared) / 1e9, 1) == total
    if active is not None:
        assert round(sum(parameter.active * prod(parameter.shape) for parameter in declared) / 1e9, 1) == active
