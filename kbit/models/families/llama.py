"""Llama, and what is published as Llama: SmolLM2, TinyLlama, Yi and others."""

from dataclasses import replace

from kbit.models.family import Family
from kbit.models.tensor_names import TensorNames

LAYER = "model.layers.{layer}"

NAMES = TensorNames(
    embedding="model.embed_tokens",
    final_norm="model.norm",
    head="lm_head",
    attention_norm=f"{LAYER}.input_layernorm",
    q=f"{LAYER}.self_attn.q_proj",
    k=f"{LAYER}.self_attn.k_proj",
    v=f"{LAYER}.self_attn.v_proj",
    o=f"{LAYER}.self_attn.o_proj",
    mlp_norm=f"{LAYER}.post_attention_layernorm",
    gate=f"{LAYER}.mlp.gate_proj",
    up=f"{LAYER}.mlp.up_proj",
    down=f"{LAYER}.mlp.down_proj",
)

# Families that followed: norms of queries and keys; and norms of what a block adds, in place of those before it.
QK_NORMS = replace(NAMES, q_norm=f"{LAYER}.self_attn.q_norm", k_norm=f"{LAYER}.self_attn.k_norm")
POST_NORMS = replace(
    QK_NORMS,
    attention_norm=None,
    attention_post_norm=f"{LAYER}.post_attention_layernorm",
    mlp_norm=None,
    mlp_post_norm=f"{LAYER}.post_feedforward_layernorm",
)

# What transformers takes where a configuration says nothing, here and in the families that followed.
DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}

FAMILY = Family(
    model_type="llama",
    architectures=("LlamaForCausalLM",),
    defaults={**DEFAULTS, "max_position_embeddings": 2048},
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    mlp_bias="mlp_bias",
    windows="none",
    names=NAMES,
)
