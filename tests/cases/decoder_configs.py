"""Configurations of tiny decoders, of every family and switch: changes to TINY, by the name of a case."""

from __future__ import annotations

from typing import Any

import decoder_configs_experts as experts
import decoder_configs_hybrid as hybrid
import decoder_configs_later as later
from decoder_config_parts import FULL, HEADS, LONGROPE, SLIDING, TEMPERED, YARN

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

# Parts of configurations by layer type, as Gemma 3 and OLMo 3 write them.
TWO_ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
}
EVERY_HEAD = {"num_key_value_heads": 6}
HALF = {"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.5}

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

# Names of classes of transformers by model_type, where one is not the other in lower case.
MODEL_TYPES = {
    "GPTNeoX": "gpt_neox",
    "Gemma3": "gemma3_text",
    "Gemma4": "gemma4_text",
    "SeedOss": "seed_oss",
    "HunYuanDenseV1": "hunyuan_v1_dense",
    "GPTBigCode": "gpt_bigcode",
    "GPTNeo": "gpt_neo",
    "CodeGen": "codegen",
}
# Likewise where the class of the model is not called ForCausalLM.
CLASSES = {"GPT2": "GPT2LMHeadModel"}
CONFIGS = {"Gemma3": "Gemma3Text", "Gemma4": "Gemma4Text"}

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
}
CASES |= experts.CASES | hybrid.CASES | later.CASES
CLASSES |= later.CLASSES
CONFIGS |= hybrid.CONFIGS | later.CONFIGS
MODEL_TYPES |= experts.MODEL_TYPES | hybrid.MODEL_TYPES | later.MODEL_TYPES
