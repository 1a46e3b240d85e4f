"""HunYuan, dense: queries and keys are normalised after they turn; a fixed alpha makes wavelengths longer."""

from dataclasses import replace

from kbit.models.families.llama import DEFAULTS, LAYER, NAMES
from kbit.models.family import Family
from kbit.models.rope_config import RopeRules

FAMILY = Family(
    model_type="hunyuan_v1_dense",
    architectures=("HunYuanDenseV1ForCausalLM",),
    defaults={**DEFAULTS, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    mlp_bias=False,
    windows="none",
    rope=RopeRules(alpha=True),
    names=replace(NAMES, q_norm=f"{LAYER}.self_attn.query_layernorm", k_norm=f"{LAYER}.self_attn.key_layernorm"),
    norm_rotated=True,
    ignored=("use_qk_norm",),  # always so here
)
