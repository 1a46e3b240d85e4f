"""Gemma 2: norms around both blocks, caps on scores and logits, a window in every other layer."""

from dataclasses import replace

from kbit.models.families.gemma import GEMMA_DEFAULTS, LAYOUT
from kbit.models.families.llama import LAYER, NAMES
from kbit.models.family import ROOT_OF_WIDTH, Family

NORMS_AROUND = replace(
    NAMES,
    attention_post_norm=f"{LAYER}.post_attention_layernorm",
    mlp_norm=f"{LAYER}.pre_feedforward_layernorm",
    mlp_post_norm=f"{LAYER}.post_feedforward_layernorm",
)

FAMILY = Family(
    model_type="gemma2",
    architectures=("Gemma2ForCausalLM",),
    defaults={
        **GEMMA_DEFAULTS,
        "hidden_activation": "gelu_pytorch_tanh",
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    },
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    mlp_bias=False,
    windows="period",
    window_period=2,
    names=NORMS_AROUND,
    activation="hidden_activation",
    score_width="query_pre_attn_scalar",
    score_cap="attn_logit_softcapping",
    logit_cap="final_logit_softcapping",
    embedding_multiplier=ROOT_OF_WIDTH,
    layout=LAYOUT,
)
