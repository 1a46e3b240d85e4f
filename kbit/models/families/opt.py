"""OPT: a table of positions that begins at its third row. The 350M model has its norms after the sums, none in the end,
and embeddings that are narrower than the residual stream."""

from dataclasses import replace

from kbit.models.family import Family
from kbit.models.layout import Layout
from kbit.models.tensor_names import TensorNames

_LAYER = "model.decoder.layers.{layer}"

_BEFORE = Family(
    model_type="opt",
    architectures=("OPTForCausalLM",),
    defaults={
        "activation_function": "relu",
        "layer_norm_eps": 1e-5,  # no key of these configurations
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "enable_bias": True,
    },
    keys={"intermediate_size": "ffn_dim"},
    activation="activation_function",
    qkv_bias="enable_bias",
    output_bias="enable_bias",
    mlp_bias="enable_bias",
    windows="none",
    names=TensorNames(
        embedding="model.decoder.embed_tokens",
        positions="model.decoder.embed_positions",
        final_norm="model.decoder.final_layer_norm",
        head="lm_head",
        attention_norm=f"{_LAYER}.self_attn_layer_norm",
        q=f"{_LAYER}.self_attn.q_proj",
        k=f"{_LAYER}.self_attn.k_proj",
        v=f"{_LAYER}.self_attn.v_proj",
        o=f"{_LAYER}.self_attn.out_proj",
        mlp_norm=f"{_LAYER}.final_layer_norm",
        gate=None,
        up=f"{_LAYER}.fc1",
        down=f"{_LAYER}.fc2",
        project_in="model.decoder.project_in",
        project_out="model.decoder.project_out",
    ),
    norm="layer",
    norm_bias=True,
    norm_eps="layer_norm_eps",
    first_position=2,
    extra_positions=2,
    embedding_width="word_embed_proj_dim",
    layout=Layout(prefix="model."),
)

_AFTER = replace(
    _BEFORE,
    names=replace(
        _BEFORE.names,
        final_norm=None,
        attention_norm=None,
        attention_sum_norm=_BEFORE.names.attention_norm,
        mlp_norm=None,
        mlp_sum_norm=_BEFORE.names.mlp_norm,
    ),
    ignored=("do_layer_norm_before", "_remove_final_layer_norm"),  # there is none to remove
)

FAMILY = replace(_BEFORE, variants=(("do_layer_norm_before", False, _AFTER),))
