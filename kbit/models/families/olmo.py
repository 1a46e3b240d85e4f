"""OLMo (1): Llama whose norms are LayerNorms without weights."""

from dataclasses import replace

from kbit.models.families.llama import FAMILY as LLAMA
from kbit.models.family import Family
from kbit.models.layout import Layout

FAMILY: Family = replace(
    LLAMA,
    model_type="olmo",
    architectures=("OlmoForCausalLM",),
    defaults={
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "norm_eps": 1e-5,  # no key of these configurations
        "tie_word_embeddings": False,
        "attention_bias": False,
    },
    mlp_bias=False,
    norm="layer",
    norm_eps="norm_eps",
    layout=Layout(plain_norms=True),
)
