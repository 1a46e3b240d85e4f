"""Gemma 3, text: norms of queries and keys, five layers with a window and a rotation of their own to one without."""

from dataclasses import replace

from kbit.models.families.gemma import GEMMA_DEFAULTS, LAYOUT
from kbit.models.families.gemma2 import NORMS_AROUND
from kbit.models.families.llama import QK_NORMS
from kbit.models.family import ROOT_OF_WIDTH, Family
from kbit.models.rope_config import RopeRules
from kbit.models.task_heads import HIDDEN

FAMILY = Family(
    model_type="gemma3_text",
    architectures=("Gemma3ForCausalLM",),
    defaults={
        **GEMMA_DEFAULTS,
        # The published configurations of 4B and more leave sizes out, too.
        "vocab_size": 262208,
        "num_attention_heads": 8,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 131072,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "use_bidirectional_attention": False,
    },
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    mlp_bias=False,
    windows="period",
    window_period="sliding_window_pattern",
    rope=RopeRules(theta=1e6, by_layer_type=True, window_theta=("rope_local_base_freq", 1e4)),
    names=replace(NORMS_AROUND, q_norm=QK_NORMS.q_norm, k_norm=QK_NORMS.k_norm),
    activation="hidden_activation",
    score_width="query_pre_attn_scalar",
    logit_cap="final_logit_softcapping",
    embedding_multiplier=ROOT_OF_WIDTH,
    # EmbeddingGemma is published as the model without a head, whose tokens see the whole text.
    bidirectional="use_bidirectional_attention",
    heads={"Gemma3TextModel": HIDDEN},
    layout=replace(LAYOUT, prefix="model."),
)
