"""Seed-OSS: biases of q, k and v, and of o where asked for."""

from kbit.models.families.llama import DEFAULTS, NAMES
from kbit.models.family import Family

FAMILY = Family(
    model_type="seed_oss",
    architectures=("SeedOssForCausalLM",),
    defaults={
        **DEFAULTS,
        "max_position_embeddings": 524288,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "attention_bias": True,
        "attention_out_bias": False,
    },
    qkv_bias="attention_bias",
    output_bias="attention_out_bias",
    mlp_bias="mlp_bias",
    windows="none",
    names=NAMES,
)
