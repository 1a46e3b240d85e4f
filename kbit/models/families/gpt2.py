"""GPT-2: a table of positions, matrices published as (inputs, outputs), q, k, v in one of them."""

from kbit.models.family import Family
from kbit.models.layout import Layout
from kbit.models.params import QKV
from kbit.models.tensor_names import TensorNames

_LAYER = "transformer.h.{layer}"

FAMILY = Family(
    model_type="gpt2",
    architectures=("GPT2LMHeadModel",),
    defaults={
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "n_positions": 1024,
        "tie_word_embeddings": True,
    },
    keys={
        "hidden_size": "n_embd",
        "intermediate_size": "n_inner",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
    },
    activation="activation_function",
    qkv_bias=True,
    output_bias=True,
    mlp_bias=True,
    windows="none",
    names=TensorNames(
        embedding="transformer.wte",
        positions="transformer.wpe",
        final_norm="transformer.ln_f",
        head="lm_head",
        attention_norm=f"{_LAYER}.ln_1",
        q=f"{_LAYER}.attn.q_proj",
        k=f"{_LAYER}.attn.k_proj",
        v=f"{_LAYER}.attn.v_proj",
        o=f"{_LAYER}.attn.c_proj",
        mlp_norm=f"{_LAYER}.ln_2",
        gate=None,
        up=f"{_LAYER}.mlp.c_fc",
        down=f"{_LAYER}.mlp.c_proj",
    ),
    norm="layer",
    norm_bias=True,
    norm_eps="layer_norm_epsilon",
    mlp_ratio=4,
    layout=Layout(fused={f"{_LAYER}.attn.c_attn": QKV}, transposed=True, prefix="transformer."),
)
