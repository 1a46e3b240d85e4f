"""Helium: Llama with neighbouring features turning together, and the last linear of attention without a bias."""

from kbit.models.families.llama import DEFAULTS, NAMES
from kbit.models.family import Family
from kbit.models.layout import Layout
from kbit.models.rope_config import RopeRules

FAMILY = Family(
    model_type="helium",
    architectures=("HeliumForCausalLM",),
    defaults={
        **DEFAULTS,
        "head_dim": 128,
        "max_position_embeddings": 4096,
        "num_key_value_heads": 20,
        "rms_norm_eps": 1e-8,
    },
    qkv_bias="attention_bias",
    output_bias=False,
    mlp_bias="mlp_bias",
    windows="none",
    rope=RopeRules(theta=1e5),
    names=NAMES,
    layout=Layout(interleaved=True),
)
