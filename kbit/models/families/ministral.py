"""Ministral (8B): Mistral with a window in some layers."""

from kbit.models.families.llama import DEFAULTS, NAMES
from kbit.models.family import Family

FAMILY = Family(
    model_type="ministral",
    architectures=("MinistralForCausalLM",),
    defaults={
        **DEFAULTS,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    qkv_bias=False,
    output_bias=False,
    mlp_bias=False,
    windows="period",
    names=NAMES,
)
