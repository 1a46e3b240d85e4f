"""MPT: scores fall with the distance (ALiBi), no biases at all, queries, keys and values in one matrix."""

from kbit.models.family import Family
from kbit.models.layout import Layout
from kbit.models.params import QKV
from kbit.models.tensor_names import TensorNames

_LAYER = "transformer.blocks.{layer}"

FAMILY = Family(
    model_type="mpt",
    architectures=("MptForCausalLM", "MPTForCausalLM"),
    defaults={
        "hidden_act": "gelu",  # no key of these configurations
        "layer_norm_epsilon": 1e-5,
        "max_seq_len": 2048,
        "tie_word_embeddings": True,
    },
    keys={
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "max_position_embeddings": "max_seq_len",
    },
    qkv_bias=False,
    output_bias=False,
    mlp_bias=False,
    windows="none",
    names=TensorNames(
        embedding="transformer.wte",
        final_norm="transformer.norm_f",
        head="lm_head",
        attention_norm=f"{_LAYER}.norm_1",
        q=f"{_LAYER}.attn.q_proj",
        k=f"{_LAYER}.attn.k_proj",
        v=f"{_LAYER}.attn.v_proj",
        o=f"{_LAYER}.attn.out_proj",
        mlp_norm=f"{_LAYER}.norm_2",
        gate=None,
        up=f"{_LAYER}.ffn.up_proj",
        down=f"{_LAYER}.ffn.down_proj",
    ),
    norm="layer",
    norm_eps="layer_norm_epsilon",
    sloped=True,
    mlp_ratio=4,
    fixed={
        "no_bias": (True,),
        "expansion_ratio": (4,),
        "embedding_fraction": (1, 1.0),
        "attn_config.alibi": (True,),
        "attn_config.alibi_bias_max": (8,),
        "attn_config.attn_type": ("multihead_attention",),
        "attn_config.prefix_lm": (False,),
        "attn_config.qk_ln": (False,),
        "attn_config.attn_uses_sequence_id": (False,),
        "attn_config.clip_qkv": (),
        "attn_config.softmax_scale": (),
    },
    even_slopes=True,
    layout=Layout(fused={f"{_LAYER}.attn.Wqkv": QKV}),
)
