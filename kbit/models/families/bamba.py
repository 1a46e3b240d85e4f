"""Bamba: Mamba-2 in all layers but a few, which attend and turn half of each head."""

from dataclasses import replace

from kbit.models.families.granitemoehybrid import SCAN_FUSED, with_scans
from kbit.models.families.llama import DEFAULTS, LAYER, NAMES
from kbit.models.family import Family
from kbit.models.layout import Layout
from kbit.models.rope_config import RopeRules
from kbit.models.scan_config import DEFAULTS as SCAN_DEFAULTS

FAMILY = Family(
    model_type="bamba",
    architectures=("BambaForCausalLM",),
    defaults={
        **DEFAULTS,
        **SCAN_DEFAULTS,
        "max_position_embeddings": 262144,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
    },
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    mlp_bias="mlp_bias",
    windows="none",
    scan="but listed",
    rope=RopeRules(share=0.5),
    names=replace(
        with_scans(NAMES),
        final_norm="model.final_layernorm",
        mlp_norm=f"{LAYER}.pre_ff_layernorm",
        gate=f"{LAYER}.feed_forward.gate_proj",
        up=f"{LAYER}.feed_forward.up_proj",
        down=f"{LAYER}.feed_forward.down_proj",
    ),
    layout=Layout(fused=SCAN_FUSED),
)
