"""SmolLM3: no rotation in every fourth layer."""

from kbit.models.families.llama import DEFAULTS, NAMES
from kbit.models.family import Family
from kbit.models.rope_config import RopeRules

FAMILY = Family(
    model_type="smollm3",
    architectures=("SmolLM3ForCausalLM",),
    defaults={
        **DEFAULTS,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "no_rope_layer_interval": 4,
    },
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    mlp_bias="mlp_bias",
    windows="chosen",
    rotated="listed",
    rope=RopeRules(theta=2e6),
    names=NAMES,
    ignored=("no_rope_layer_interval",),  # where every layer is listed
)
