"""LFM2 and 2.5: short convolutions between gates in place of attention, but for some layers; a norm of heads there."""

from dataclasses import replace

from kbit.models.families.llama import DEFAULTS, LAYER, NAMES
from kbit.models.family import Family
from kbit.models.layout import Layout
from kbit.models.params_recurrent import CONV
from kbit.models.rope_config import RopeRules

LFM2_NAMES = replace(
    NAMES,
    final_norm="model.embedding_norm",
    attention_norm=f"{LAYER}.operator_norm",
    q_norm=f"{LAYER}.self_attn.q_layernorm",
    k_norm=f"{LAYER}.self_attn.k_layernorm",
    o=f"{LAYER}.self_attn.out_proj",
    mlp_norm=f"{LAYER}.ffn_norm",
    gate=f"{LAYER}.feed_forward.w1",
    up=f"{LAYER}.feed_forward.w3",
    down=f"{LAYER}.feed_forward.w2",
    conv_b=f"{LAYER}.conv.b_proj",
    conv_c=f"{LAYER}.conv.c_proj",
    conv_x=f"{LAYER}.conv.x_proj",
    conv_taps=f"{LAYER}.conv.conv",
    conv_out=f"{LAYER}.conv.out_proj",
)
LFM2_DEFAULTS = {
    **DEFAULTS,
    "max_position_embeddings": 128000,
    "num_key_value_heads": 8,
    "norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "conv_L_cache": 3,
    "conv_bias": False,
}
# Older configurations' names of two keys, which win.
LFM2_KEYS = {"tie_word_embeddings": "tie_embedding", "intermediate_size": "block_ff_dim"}

FAMILY = Family(
    model_type="lfm2",
    architectures=("Lfm2ForCausalLM",),
    defaults={
        **LFM2_DEFAULTS,
        "block_auto_adjust_ff_dim": True,
        "block_ffn_dim_multiplier": 1.0,
        "block_multiple_of": 256,
    },
    qkv_bias=False,
    output_bias=False,
    mlp_bias=False,
    windows="none",
    conv=True,
    adjusted=True,
    rope=RopeRules(theta=1000000.0),
    names=LFM2_NAMES,
    norm_eps="norm_eps",
    keys=LFM2_KEYS,
    fixed={"block_use_swiglu": (True,), "conv_use_xavier_init": (True, False), "use_pos_enc": (True,)},
    layout=Layout(fused={f"{LAYER}.conv.in_proj": CONV}),
)
