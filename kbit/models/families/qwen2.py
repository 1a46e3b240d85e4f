"""Qwen2 and Qwen2.5: biases of q, k and v, and sliding windows in some layers where asked for."""

from kbit.models.families.llama import DEFAULTS, NAMES
from kbit.models.family import Family

FAMILY = Family(
    model_type="qwen2",
    architectures=("Qwen2ForCausalLM",),
    defaults={
        **DEFAULTS,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    qkv_bias=True,
    output_bias=False,
    mlp_bias=False,
    windows="chosen",
    names=NAMES,
)
