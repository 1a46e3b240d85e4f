"""Cohere: Command R. One norm, then attention and MLP side by side; neighbours turn together; logits are scaled."""

from dataclasses import replace

from kbit.models.families.llama import DEFAULTS, NAMES
from kbit.models.family import Family
from kbit.models.layout import Layout
from kbit.models.rope_config import RopeRules

FAMILY = Family(
    model_type="cohere",
    architectures=("CohereForCausalLM",),
    defaults={
        **DEFAULTS,
        "layer_norm_eps": 1e-5,
        "logit_scale": 0.0625,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    mlp_bias=False,
    windows="none",
    rope=RopeRules(theta=5e5),
    names=replace(NAMES, mlp_norm=None),
    norm="layer",
    norm_eps="layer_norm_eps",
    parallel=True,
    logit_factor="logit_scale",
    layout=Layout(interleaved=True),
)
