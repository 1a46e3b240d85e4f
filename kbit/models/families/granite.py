"""Granite: factors on embeddings, scores, what blocks add, and a divisor of logits."""

from kbit.models.families.llama import DEFAULTS, NAMES
from kbit.models.family import Family

GRANITE_DEFAULTS = {
    **DEFAULTS,
    "max_position_embeddings": 2048,
    "embedding_multiplier": 1.0,
    "logits_scaling": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": 1.0,
}

FAMILY = Family(
    model_type="granite",
    architectures=("GraniteForCausalLM",),
    defaults=GRANITE_DEFAULTS,
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    mlp_bias="mlp_bias",
    windows="none",
    names=NAMES,
    score_scale="attention_multiplier",
    embedding_multiplier="embedding_multiplier",
    residual_multiplier="residual_multiplier",
    logit_divisor="logits_scaling",
)
