"""Qwen3: norms of every head's queries and keys, and sliding windows in some layers where asked for."""

from kbit.models.families.llama import DEFAULTS, QK_NORMS
from kbit.models.family import Family
from kbit.models.layout import Layout
from kbit.models.task_heads import HIDDEN

FAMILY = Family(
    model_type="qwen3",
    architectures=("Qwen3ForCausalLM",),
    defaults={
        **DEFAULTS,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    mlp_bias=False,
    windows="chosen",
    names=QK_NORMS,
    # Qwen3-Embedding is published as the model without a head.
    heads={"Qwen3Model": HIDDEN},
    layout=Layout(prefix="model."),
)
