"""Gemma: norm weights stored less 1, embeddings times the root of their width, gelu."""

from kbit.models.families.llama import DEFAULTS, NAMES
from kbit.models.family import ROOT_OF_WIDTH, Family
from kbit.models.layout import Layout

GEMMA_DEFAULTS = {**DEFAULTS, "max_position_embeddings": 8192, "head_dim": 256, "tie_word_embeddings": True}
LAYOUT = Layout(norm_offset=1.0)

FAMILY = Family(
    model_type="gemma",
    architectures=("GemmaForCausalLM",),
    defaults={**GEMMA_DEFAULTS, "hidden_act": "gelu_pytorch_tanh", "num_key_value_heads": 16},
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    mlp_bias=False,
    windows="none",
    names=NAMES,
    activations={"gelu": "gelu_tanh"},  # the first files say gelu and mean its approximation
    embedding_multiplier=ROOT_OF_WIDTH,
    layout=LAYOUT,
)
