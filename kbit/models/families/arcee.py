"""Arcee (AFM): Llama whose MLP has no gate, and a squared relu."""

from dataclasses import replace

from kbit.models.families.llama import DEFAULTS, NAMES
from kbit.models.family import Family

FAMILY = Family(
    model_type="arcee",
    architectures=("ArceeForCausalLM",),
    defaults={**DEFAULTS, "hidden_act": "relu2", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    mlp_bias="mlp_bias",
    windows="none",
    names=replace(NAMES, gate=None),
)
