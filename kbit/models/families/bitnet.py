"""BitNet b1.58: ternary weights, norms of what the last linears of attention and MLP read, and a squared relu as gate.

Its linears were trained to read activations that are rounded to 8 bits a token. kbit reads the ternary weights
(`kbit.checkpoint.packed.bitnet`) and does not round.
"""

from dataclasses import replace

from kbit.models.families.llama import DEFAULTS, LAYER, NAMES
from kbit.models.family import Family
from kbit.models.rope_config import RopeRules

FAMILY = Family(
    model_type="bitnet",
    architectures=("BitNetForCausalLM",),
    defaults={
        **DEFAULTS,
        "hidden_act": "relu2",
        "max_position_embeddings": 2048,
        "num_key_value_heads": 5,
        "rms_norm_eps": 1e-5,
    },
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    mlp_bias=False,
    windows="none",
    rope=RopeRules(theta=500000.0),
    names=replace(
        NAMES,
        attention_inner_norm=f"{LAYER}.self_attn.attn_sub_norm",
        mlp_inner_norm=f"{LAYER}.mlp.ffn_sub_norm",
    ),
)
