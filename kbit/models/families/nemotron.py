"""Nemotron, Minitron: LayerNorms stored less 1, half of a head turns, an MLP without a gate and a squared relu."""

from dataclasses import replace

from kbit.models.families.llama import DEFAULTS, NAMES
from kbit.models.family import Family
from kbit.models.layout import Layout
from kbit.models.rope_config import RopeRules

FAMILY = Family(
    model_type="nemotron",
    architectures=("NemotronForCausalLM",),
    defaults={**DEFAULTS, "hidden_act": "relu2", "max_position_embeddings": 4096, "norm_eps": 1e-5},
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    mlp_bias="mlp_bias",
    windows="none",
    rope=RopeRules(share=0.5),
    names=replace(NAMES, gate=None),
    norm="layer",
    norm_bias=True,
    norm_eps="norm_eps",
    layout=Layout(norm_offset=1.0),
)
