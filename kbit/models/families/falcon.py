"""Falcon: attention and MLP stand side by side, after one norm with one key/value head (7B), or after two (40B, 180B).

Of the larger models queries, keys and values are in one matrix by key/value head. RW is BLOOM without a norm of the
embedding: scores fall with the distance before they are scaled, attention and MLP come one after another.
"""

from dataclasses import replace

from kbit.models.family import Family
from kbit.models.layout import Grouped, Layout
from kbit.models.params import QKV
from kbit.models.tensor_names import TensorNames

_LAYER = "transformer.h.{layer}"

_SMALL = Family(
    model_type="falcon",
    architectures=("FalconForCausalLM",),
    defaults={
        "activation": "gelu",
        "layer_norm_epsilon": 1e-5,
        "max_position_embeddings": 2048,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        "bias": False,
    },
    keys={"intermediate_size": "ffn_hidden_size"},
    activation="activation",
    qkv_bias="bias",
    output_bias="bias",
    mlp_bias="bias",
    windows="none",
    names=TensorNames(
        embedding="transformer.word_embeddings",
        final_norm="transformer.ln_f",
        head="lm_head",
        attention_norm=f"{_LAYER}.input_layernorm",
        q=f"{_LAYER}.self_attention.q_proj",
        k=f"{_LAYER}.self_attention.k_proj",
        v=f"{_LAYER}.self_attention.v_proj",
        o=f"{_LAYER}.self_attention.dense",
        gate=None,
        up=f"{_LAYER}.mlp.dense_h_to_4h",
        down=f"{_LAYER}.mlp.dense_4h_to_h",
    ),
    norm="layer",
    norm_bias=True,
    norm_eps="layer_norm_epsilon",
    parallel=True,
    mlp_ratio=4,
    layout=Layout(fused={f"{_LAYER}.self_attention.query_key_value": QKV}),
)

_LARGE = replace(
    _SMALL,
    keys={**_SMALL.keys, "num_key_value_heads": "num_kv_heads"},
    names=replace(_SMALL.names, attention_norm=f"{_LAYER}.ln_attn", mlp_norm=f"{_LAYER}.ln_mlp"),
    layout=Layout(grouped={f"{_LAYER}.self_attention.query_key_value": Grouped(QKV, "key/value heads")}),
    fixed={"new_decoder_architecture": (True,), "num_ln_in_parallel_attn": (2,)},
    ignored=("multi_query", "parallel_attn"),  # as they may be, these are not read
)

_SLOPED = replace(
    _SMALL,
    defaults={**_SMALL.defaults, "num_key_value_heads": None},
    keys={**_SMALL.keys, "num_key_value_heads": "num_kv_heads"},
    names=replace(_SMALL.names, mlp_norm=f"{_LAYER}.post_attention_layernorm"),
    parallel=False,
    sloped=True,
    slopes_scaled=True,
    even_slopes=True,
    layout=Layout(fused={f"{_LAYER}.self_attention.query_key_value": QKV}, by_head=True),
    fixed={"multi_query": (False,), "new_decoder_architecture": (False,), "parallel_attn": (False,)},
    ignored=("alibi",),
)

FAMILY = replace(_SMALL, variants=(("new_decoder_architecture", True, _LARGE), ("alibi", True, _SLOPED)))
