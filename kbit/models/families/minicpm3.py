"""MiniCPM3: latent attention in a dense model, pairs half of what turns apart, and factors on embeddings, additions and
logits that depend on depth and width."""

from dataclasses import replace

from kbit.models.families.deepseek_v2 import LATENT, LATENT_LAYOUT, LATENT_NAMES
from kbit.models.families.llama import DEFAULTS
from kbit.models.family import Family
from kbit.models.rope_config import RopeRules

FAMILY = Family(
    model_type="minicpm3",
    architectures=("MiniCPM3ForCausalLM",),
    defaults={
        **DEFAULTS,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "kv_lora_rank": 256,
        "q_lora_rank": 768,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "scale_emb": 12,
        "scale_depth": 1.4,
        "dim_model_base": 256,
    },
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    mlp_bias="mlp_bias",
    windows="none",
    rope=RopeRules(kinds=("default", "yarn", "longrope")),
    names=LATENT_NAMES,
    embedding_multiplier="scale_emb",
    depth_scale="scale_depth",
    logit_width="dim_model_base",
    layout=replace(LATENT_LAYOUT, interleaved=False),
    latent=LATENT,
)
