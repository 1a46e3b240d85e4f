"""Falcon-H1: Mamba-2 and attention side by side in every layer, of one norm, and factors on nearly everything."""

from dataclasses import replace

from kbit.models.families.bamba import FAMILY as BAMBA
from kbit.models.family import Family

FACTORS = {
    "attention_in_multiplier": 1.0,
    "attention_out_multiplier": 1.0,
    "embedding_multiplier": 1.0,
    "key_multiplier": 1.0,
    "lm_head_multiplier": 1.0,
    "ssm_in_multiplier": 1.0,
    "ssm_out_multiplier": 1.0,
}

FAMILY = Family(
    model_type="falcon_h1",
    architectures=("FalconH1ForCausalLM",),
    defaults={
        **BAMBA.defaults,
        **FACTORS,
        "max_position_embeddings": 8192,
        "mamba_d_ssm": 1024,
        "mamba_norm_before_gate": True,
        "mamba_rms_norm": False,
        "projectors_bias": False,
    },
    # (A factor on what attention reads is found in what it makes, where there are no biases.)
    qkv_bias=False,
    output_bias=False,
    mlp_bias="mlp_bias",
    windows="none",
    scan="beside",
    multiplied=True,
    fixed={"attention_bias": (False,)},
    embedding_multiplier="embedding_multiplier",
    logit_factor="lm_head_multiplier",
    names=replace(BAMBA.names, scan_norm="model.layers.{layer}.mamba.norm"),
    layout=BAMBA.layout,
)
