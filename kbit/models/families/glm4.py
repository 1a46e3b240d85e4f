"""GLM-4-0414: GLM with norms around both blocks."""

from dataclasses import replace

from kbit.models.families.glm import GLM_DEFAULTS, LAYOUT, ROPE
from kbit.models.families.llama import LAYER, NAMES
from kbit.models.family import Family

FAMILY = Family(
    model_type="glm4",
    architectures=("Glm4ForCausalLM",),
    defaults=GLM_DEFAULTS,
    qkv_bias="attention_bias",
    output_bias=False,
    mlp_bias=False,
    windows="none",
    rope=ROPE,
    names=replace(
        NAMES,
        attention_post_norm=f"{LAYER}.post_self_attn_layernorm",
        mlp_post_norm=f"{LAYER}.post_mlp_layernorm",
    ),
    layout=LAYOUT,
)
