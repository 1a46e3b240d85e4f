"""Ministral 3: queries grow with their position (Llama 4's temperature), and the context is extended by YaRN."""

from kbit.models.families.llama import DEFAULTS, NAMES
from kbit.models.family import Family
from kbit.models.rope_config import RopeRules

FAMILY = Family(
    model_type="ministral3",
    architectures=("Ministral3ForCausalLM",),
    defaults={
        **DEFAULTS,
        "max_position_embeddings": 262144,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 16.0,
            "original_max_position_embeddings": 16384,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale_all_dim": 1.0,
            "mscale": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    },
    qkv_bias=False,
    output_bias=False,
    mlp_bias=False,
    windows="all",
    rope=RopeRules(temperature=True),
    names=NAMES,
)
