"""Phi 1, 1.5 and 2: one norm, after which attention and MLP stand side by side; biases everywhere, the head's too."""

from dataclasses import replace

from kbit.models.families.llama import LAYER, NAMES
from kbit.models.family import Family
from kbit.models.rope_config import RopeRules

FAMILY = Family(
    model_type="phi",
    architectures=("PhiForCausalLM",),
    defaults={
        "hidden_act": "gelu_new",
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    },
    qkv_bias=True,
    output_bias=True,
    mlp_bias=True,
    head_bias=True,
    windows="none",
    rope=RopeRules(share=0.5),
    names=replace(
        NAMES,
        final_norm="model.final_layernorm",
        o=f"{LAYER}.self_attn.dense",
        mlp_norm=None,
        gate=None,
        up=f"{LAYER}.mlp.fc1",
        down=f"{LAYER}.mlp.fc2",
    ),
    norm="layer",
    norm_bias=True,
    norm_eps="layer_norm_eps",
    parallel=True,
)
