"""BLOOM: scores fall with the distance (ALiBi), a norm after the embedding, q, k, v by head in one matrix."""

from kbit.models.family import Family
from kbit.models.layout import Layout
from kbit.models.params import QKV
from kbit.models.tensor_names import TensorNames

_LAYER = "transformer.h.{layer}"

FAMILY = Family(
    model_type="bloom",
    architectures=("BloomForCausalLM",),
    defaults={
        "hidden_act": "gelu_pytorch_tanh",  # no key of these configurations
        "layer_norm_epsilon": 1e-5,
        "seq_length": 2048,
        "tie_word_embeddings": True,
    },
    keys={
        "intermediate_size": "n_inner",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "seq_length",
    },
    qkv_bias=True,
    output_bias=True,
    mlp_bias=True,
    windows="none",
    names=TensorNames(
        embedding="transformer.word_embeddings",
        embedding_norm="transformer.word_embeddings_layernorm",
        final_norm="transformer.ln_f",
        head="lm_head",
        attention_norm=f"{_LAYER}.input_layernorm",
        q=f"{_LAYER}.self_attention.q_proj",
        k=f"{_LAYER}.self_attention.k_proj",
        v=f"{_LAYER}.self_attention.v_proj",
        o=f"{_LAYER}.self_attention.dense",
        mlp_norm=f"{_LAYER}.post_attention_layernorm",
        gate=None,
        up=f"{_LAYER}.mlp.dense_h_to_4h",
        down=f"{_LAYER}.mlp.dense_4h_to_h",
    ),
    norm="layer",
    norm_bias=True,
    norm_eps="layer_norm_epsilon",
    sloped=True,
    mlp_ratio=4,
    layout=Layout(fused={f"{_LAYER}.self_attention.query_key_value": QKV}, by_head=True, prefix="transformer."),
)
