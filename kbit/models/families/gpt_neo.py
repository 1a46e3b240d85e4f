"""GPT-Neo: a table of positions, scores that are not scaled, a window in every other layer."""

from dataclasses import replace

from kbit.models.families.gpt2 import FAMILY as GPT2
from kbit.models.layout import Layout

_ATTENTION = "transformer.h.{layer}.attn.attention"

FAMILY = replace(
    GPT2,
    model_type="gpt_neo",
    architectures=("GPTNeoForCausalLM",),
    defaults={
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "window_size": 256,
        "score_scale": 1.0,  # no key of these configurations
    },
    keys={"num_hidden_layers": "num_layers", "num_attention_heads": "num_heads", "sliding_window": "window_size"},
    qkv_bias=False,
    windows="runs",
    score_scale="score_scale",
    names=replace(
        GPT2.names,
        q=f"{_ATTENTION}.q_proj",
        k=f"{_ATTENTION}.k_proj",
        v=f"{_ATTENTION}.v_proj",
        o=f"{_ATTENTION}.out_proj",
    ),
    layout=Layout(prefix="transformer."),
)
