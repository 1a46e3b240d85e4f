"""Llama, and what is published as Llama: SmolLM2, TinyLlama, Yi and others."""

from kbit.models.family import Family
from kbit.models.spec import TensorNames

NAMES = TensorNames(
    embedding="model.embed_tokens",
    final_norm="model.norm",
    head="lm_head",
    attention_norm="model.layers.{layer}.input_layernorm",
    q="model.layers.{layer}.self_attn.q_proj",
    k="model.layers.{layer}.self_attn.k_proj",
    v="model.layers.{layer}.self_attn.v_proj",
    o="model.layers.{layer}.self_attn.o_proj",
    mlp_norm="model.layers.{layer}.post_attention_layernorm",
    gate="model.layers.{layer}.mlp.gate_proj",
    up="model.layers.{layer}.mlp.up_proj",
    down="model.layers.{layer}.mlp.down_proj",
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
