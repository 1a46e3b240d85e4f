"""EXAONE 4: norms of what blocks add and of queries and keys; where layers have windows, the others do not rotate."""

from kbit.models.families.llama import DEFAULTS, POST_NORMS
from kbit.models.family import Family

FAMILY = Family(
    model_type="exaone4",
    architectures=("Exaone4ForCausalLM",),
    defaults={
        **DEFAULTS,
        "max_position_embeddings": 2048,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-5,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
    },
    qkv_bias=False,
    output_bias=False,
    mlp_bias=False,
    windows="period",
    window_period="sliding_window_pattern",
    rotated="windowed",
    names=POST_NORMS,
)
