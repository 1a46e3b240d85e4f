"""Configurations of tiny decoders, of every family and switch: changes to TINY, by the name of a case."""

from __future__ import annotations

from typing import Any

import decoder_configs_hybrid as hybrid
import decoder_configs_later as later

PAD = 0

# 6 heads of 8 with 2 key/value heads; a vocabulary and an MLP that are no multiple of anything.
TINY: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 77,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": None,
    "attn_implementation": "eager",
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 8}

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.6],
    "long_factor": [1.0, 2.0, 5.0, 9.0],
}
# Parts of configurations by layer type, as Gemma 3 and OLMo 3 write them.
TWO_ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
}
TEMPERED = {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.3}
HEADS = {"head_dim": 8}
EVERY_HEAD = {"num_key_value_heads": 6}
HALF = {"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.5}
SLIDING, FULL = "sliding_attention", "full_attention"

# Layers without a window have heads of 32 that turn by a quarter.
GEMMA4 = {
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": 7,
    "rope_parameters": {
        SLIDING: {"rope_type": "default", "rope_theta": 100.0},
        FULL: {"rope_type": "proportional", "rope_theta": 5000.0, "partial_rotary_factor": 0.25},
    },
}
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

EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

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

# Names of classes of transformers by model_type, where one is not the other in lower case.
MODEL_TYPES = {
    "GPTNeoX": "gpt_neox",
    "Gemma3": "gemma3_text",
    "Gemma4": "gemma4_text",
    "SeedOss": "seed_oss",
    "HunYuanDenseV1": "hunyuan_v1_dense",
}
MODEL_TYPES |= {"GPTBigCode": "gpt_bigcode", "GPTNeo": "gpt_neo", "CodeGen": "codegen"}
MODEL_TYPES |= {"Qwen3Moe": "qwen3_moe", "Qwen2Moe": "qwen2_moe", "Glm4Moe": "glm4_moe", "MiniMaxM2": "minimax_m2"}
MODEL_TYPES |= {"Lfm2Moe": "lfm2_moe", "GraniteMoeHybrid": "granitemoehybrid"}
MODEL_TYPES |= {
    "GptOss": "gpt_oss",
    "Qwen3Next": "qwen3_next",
    "Qwen3_5": "qwen3_5_text",
    "Qwen3_5Moe": "qwen3_5_moe_text",
}
MODEL_TYPES |= {"DeepseekV2": "deepseek_v2", "DeepseekV3": "deepseek_v3", "Glm4MoeLite": "glm4_moe_lite"}
# Likewise where the class of the model is not called ForCausalLM.
CLASSES = {"GPT2": "GPT2LMHeadModel"}
CONFIGS = {"Gemma3": "Gemma3Text", "Gemma4": "Gemma4Text", "Qwen3_5": "Qwen3_5Text", "Qwen3_5Moe": "Qwen3_5MoeText"}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("Llama", {"head_dim": 14, "num_key_value_heads": 3}),
    "llama-multi-query": ("Llama", {"num_key_value_heads": 1}),
    "llama-every-head": ("Llama", {"num_key_value_heads": 6, "rms_norm_eps": 1e-2}),
    "llama-gelu": ("Llama", {"hidden_act": "gelu"}),
    "llama-gelu-tanh": ("Llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "llama-gelu-new": ("Llama", {"hidden_act": "gelu_new"}),
    "llama-relu": ("Llama", {"hidden_act": "relu"}),
    "llama-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0}}),
    "llama-dynamic": ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.5, "rope_theta": 1000.0}}),
    "llama-llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-longrope": ("Llama", {"original_max_position_embeddings": 32, "rope_parameters": LONGROPE}),
    "llama-yarn": ("Llama", {"rope_parameters": YARN}),
    "qwen2-yarn-mscale": ("Qwen2", {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.3}}),
    "mistral-window": ("Mistral", {"sliding_window": 7}),
    # 2, not 1: with a window of 1 transformers' own cache keeps everything (it slices [-0:]).
    "mistral-window-2": ("Mistral", {"sliding_window": 2}),
    "mistral-no-window": ("Mistral", {"sliding_window": None, "head_dim": 10}),
    "mistral-dynamic-window": (
        "Mistral",
        {"sliding_window": 9, "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}},
    ),
    "qwen2": ("Qwen2", {}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-some-windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen2-layer-types": (
        "Qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "qwen3": ("Qwen3", {"head_dim": 10}),
    "qwen3-biases-windows": (
        "Qwen3",
        {
            **HEADS,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 6,
            "max_window_layers": 2,
        },
    ),
    "gemma": ("Gemma", {"head_dim": 14}),
    "gemma2": ("Gemma2", {**HEADS, "query_pre_attn_scalar": 24, "sliding_window": 7, "attn_logit_softcapping": 3.0}),
    "gemma2-no-caps": (
        "Gemma2",
        {**HEADS, "sliding_window": 7, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "gemma3": (
        "Gemma3",
        {
            "head_dim": 10,
            "query_pre_attn_scalar": 20,
            "sliding_window": 7,
            "layer_types": [SLIDING, FULL, SLIDING],
            "rope_parameters": TWO_ROPES,
        },
    ),
    "gemma3-capped": ("Gemma3", {**HEADS, "sliding_window": 7, "final_logit_softcapping": 5.0}),
    # As E2B and E4B, with embeddings for every layer and keys that several layers share; 31B; and 26B-A4B.
    "gemma4-e": (
        "Gemma4",
        {
            **GEMMA4,
            "num_hidden_layers": 6,
            "layer_types": [SLIDING, FULL, SLIDING, SLIDING, SLIDING, FULL],
            "vocab_size_per_layer_input": 131,
            "hidden_size_per_layer_input": 12,
            "num_kv_shared_layers": 3,
            "use_double_wide_mlp": True,
            "final_logit_softcapping": 5.0,
        },
    ),
    "gemma4-dense": (
        "Gemma4",
        {
            **GEMMA4,
            "layer_types": [SLIDING, SLIDING, FULL],
            "hidden_size_per_layer_input": 0,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
        },
    ),
    "gemma4-moe": (
        "Gemma4",
        {
            **GEMMA4,
            "layer_types": [SLIDING, FULL, FULL],
            "hidden_size_per_layer_input": 0,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 3,
            "enable_moe_block": True,
            "num_experts": 6,
            "top_k_experts": 2,
            "moe_intermediate_size": 24,
        },
    ),
    "phi3": ("Phi3", {"partial_rotary_factor": 0.5, "tie_word_embeddings": True}),
    "phi3-window": ("Phi3", {"sliding_window": 7}),
    "phi3-longrope": ("Phi3", {"original_max_position_embeddings": 32, "rope_parameters": LONGROPE}),
    "phi3-longrope-partial": (
        "Phi3",
        {
            "original_max_position_embeddings": 32,
            "max_position_embeddings": 128,
            "partial_rotary_factor": 0.5,
            "rope_parameters": {**LONGROPE, "short_factor": [1.0, 1.2], "long_factor": [1.5, 6.0]},
        },
    ),
    "granite": (
        "Granite",
        {
            "embedding_multiplier": 3.0,
            "logits_scaling": 4.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.5,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "smollm3": ("SmolLM3", {"no_rope_layer_interval": 2, "rope_parameters": {**YARN, "rope_theta": 1000.0}}),
    "smollm3-listed": ("SmolLM3", {"no_rope_layers": [0, 1, 1], "tie_word_embeddings": False}),
    "olmo2": ("Olmo2", {}),
    "olmo2-biases": ("Olmo2", {"attention_bias": True, "tie_word_embeddings": True}),
    "olmo3": (
        "Olmo3",
        {
            "sliding_window": 7,
            "layer_types": [SLIDING, FULL, SLIDING],
            "rope_parameters": {SLIDING: {"rope_type": "default", "rope_theta": 100.0}, FULL: YARN},
        },
    ),
    "ministral": ("Ministral", {**HEADS, "sliding_window": 7, "layer_types": [SLIDING, FULL, SLIDING]}),
    "ministral3": ("Ministral3", {**HEADS, "rope_parameters": TEMPERED}),
    "exaone4": ("Exaone4", {"sliding_window": 7, "layer_types": [SLIDING, SLIDING, FULL]}),
    "exaone4-no-window": ("Exaone4", {"sliding_window": None, "layer_types": [FULL] * 3, "tie_word_embeddings": True}),
    "glm": ("Glm", {**HEADS, "attention_bias": False}),
    "glm4": ("Glm4", {"head_dim": 16}),
    "seed-oss": ("SeedOss", HEADS),
    "seed-oss-biases": ("SeedOss", {**HEADS, "attention_bias": False, "attention_out_bias": True, "mlp_bias": True}),
    "hunyuan": ("HunYuanDenseV1", HEADS),
    "hunyuan-alpha": (
        "HunYuanDenseV1",
        {
            **HEADS,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "alpha": 50.0, "factor": 1.0},
        },
    ),
    "bloom": ("Bloom", {**EVERY_HEAD, "n_inner": None, "seq_length": 64}),
    "gpt2": ("GPT2", {**EVERY_HEAD, "n_inner": 77, "max_position_embeddings": 64}),
    "opt": ("OPT", {**EVERY_HEAD, "ffn_dim": 77, "word_embed_proj_dim": 48, "max_position_embeddings": 64}),
    "gpt_bigcode": ("GPTBigCode", {"num_key_value_heads": 1, "n_inner": 77, "max_position_embeddings": 64}),
    "gpt_neo": (
        "GPTNeo",
        {
            **EVERY_HEAD,
            "attention_types": [[["global", "local"], 1], [["local"], 1]],
            "window_size": 7,
            "max_position_embeddings": 64,
        },
    ),
    "gptj": ("GPTJ", {**EVERY_HEAD, "rotary_dim": 4, "n_inner": 77, "max_position_embeddings": 64}),
    "codegen": (
        "CodeGen",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "rotary_dim": 4,
            "n_inner": 77,
            "max_position_embeddings": 64,
        },
    ),
    "phi": ("Phi", {"num_key_value_heads": 3}),
    "arcee": ("Arcee", {"attention_bias": True, "rope_parameters": YARN}),
    "nemotron": ("Nemotron", {"head_dim": 12, "mlp_bias": True}),
    "gpt_neox": ("GPTNeoX", {**EVERY_HEAD, "rope_parameters": HALF}),
    "gpt_neox-sequential": ("GPTNeoX", {**EVERY_HEAD, "use_parallel_residual": False, "attention_bias": False}),
    "starcoder2": ("Starcoder2", {"sliding_window": 7}),
    "starcoder2-no-biases": ("Starcoder2", {"use_bias": False, "tie_word_embeddings": False}),
    "stablelm": ("StableLm", {"use_qkv_bias": True, "rope_parameters": HALF}),
    "cohere": ("Cohere", {"logit_scale": 0.3}),
    "cohere-biases": ("Cohere", {"attention_bias": True, "tie_word_embeddings": False}),
    "falcon-40b": (
        "Falcon",
        {
            "num_kv_heads": 2,
            "num_key_value_heads": 2,
            "new_decoder_architecture": True,
            "ffn_hidden_size": 77,
            "tie_word_embeddings": False,
        },
    ),
    "mpt": ("Mpt", {"num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 192, "max_seq_len": 64}),
    "falcon": ("Falcon", {"num_key_value_heads": 1, "ffn_hidden_size": 77}),
    "ernie4_5": ("Ernie4_5", {"head_dim": 10}),
    "ernie4_5-biases": ("Ernie4_5", {**HEADS, "use_bias": True, "tie_word_embeddings": False}),
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
    "olmoe": ("Olmoe", {"num_experts": 5, "num_experts_per_tok": 2}),
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
CASES |= hybrid.CASES | later.CASES
CLASSES |= later.CLASSES
CONFIGS |= later.CONFIGS
MODEL_TYPES |= hybrid.MODEL_TYPES | later.MODEL_TYPES
