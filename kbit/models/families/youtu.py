"""Youtu-LLM: DeepSeek-V3's latent attention in a dense model."""

from kbit.models.families.deepseek_v2 import LATENT, LATENT_LAYOUT, LATENT_NAMES, LATENT_ROPE
from kbit.models.families.llama import DEFAULTS
from kbit.models.family import Family

FAMILY = Family(
    model_type="youtu",
    architectures=("YoutuForCausalLM",),
    defaults={
        **DEFAULTS,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
    },
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    mlp_bias=False,
    windows="none",
    rope=LATENT_ROPE,
    names=LATENT_NAMES,
    fixed={"mlp_bias": (False,), "rope_interleave": (True,)},
    layout=LATENT_LAYOUT,
    latent=LATENT,
)
