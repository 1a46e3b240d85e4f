"""ERNIE 4.5, dense: pairs that turn lie side by side; one switch for all biases."""

from kbit.models.families.llama import DEFAULTS, NAMES
from kbit.models.family import Family
from kbit.models.layout import Layout
from kbit.models.rope_config import RopeRules

FAMILY = Family(
    model_type="ernie4_5",
    architectures=("Ernie4_5ForCausalLM",),
    defaults={
        **DEFAULTS,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "use_bias": False,
    },
    qkv_bias="use_bias",
    output_bias="use_bias",
    mlp_bias="use_bias",
    windows="none",
    rope=RopeRules(theta=5e5),
    names=NAMES,
    layout=Layout(interleaved=True),
)
