"""Falcon 7B: one key/value head, one norm, after which attention and MLP stand side by side. 40B and RW are others."""

from kbit.models.family import Family
from kbit.models.layout import Layout
from kbit.models.params import QKV
from kbit.models.spec import TensorNames

_LAYER = "transformer.h.{layer}"

FAMILY = Family(
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
