"""GPT-NeoX, Pythia: attention and MLP side by side, a quarter of a head turns, q, k, v by head in one matrix."""

from kbit.models.family import Family
from kbit.models.layout import Layout
from kbit.models.params import QKV
from kbit.models.rope_config import RopeRules
from kbit.models.tensor_names import TensorNames

_LAYER = "gpt_neox.layers.{layer}"

FAMILY = Family(
    model_type="gpt_neox",
    architectures=("GPTNeoXForCausalLM",),
    defaults={
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "attention_bias": True,
        "use_parallel_residual": True,
    },
    keys={"rope_theta": "rotary_emb_base"},
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    mlp_bias=True,
    windows="none",
    rope=RopeRules(share=0.25, share_key="rotary_pct"),
    names=TensorNames(
        embedding="gpt_neox.embed_in",
        final_norm="gpt_neox.final_layer_norm",
        head="embed_out",
        attention_norm=f"{_LAYER}.input_layernorm",
        q=f"{_LAYER}.attention.q_proj",
        k=f"{_LAYER}.attention.k_proj",
        v=f"{_LAYER}.attention.v_proj",
        o=f"{_LAYER}.attention.dense",
        mlp_norm=f"{_LAYER}.post_attention_layernorm",
        gate=None,
        up=f"{_LAYER}.mlp.dense_h_to_4h",
        down=f"{_LAYER}.mlp.dense_4h_to_h",
    ),
    norm="layer",
    norm_bias=True,
    norm_eps="layer_norm_eps",
    parallel="use_parallel_residual",
    layout=Layout(fused={f"{_LAYER}.attention.query_key_value": QKV}, by_head=True),
)
