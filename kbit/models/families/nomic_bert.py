"""Nomic BERT (nomic-embed-text): BERT with rotary positions and a gated MLP, without biases in its linears.

Published configurations use names of GPT-2's, those that transformers saves BERT's.
"""

from dataclasses import replace

from kbit.models.families.bert import FAMILY as BERT
from kbit.models.families.bert import MASK, NAMES, UNUSED
from kbit.models.layout import Layout
from kbit.models.rope_config import RopeRules

LAYER = "encoder.layers.{layer}"

FAMILY = replace(
    BERT,
    model_type="nomic_bert",
    architectures=("NomicBertModel",),
    defaults={**BERT.defaults, "hidden_act": "silu", "max_position_embeddings": 2048},
    keys={
        "hidden_size": "n_embd",
        "intermediate_size": "n_inner",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
        "layer_norm_eps": "layer_norm_epsilon",
        "hidden_act": "activation_function",
        "rope_theta": "rotary_emb_base",
    },
    activations={"swiglu": "silu"},
    rope=RopeRules(theta=1000.0, kinds=("default",)),
    qkv_bias=False,
    output_bias=False,
    mlp_bias=False,
    names=replace(
        NAMES,
        positions=None,
        embedding_norm="emb_ln",
        q=f"{LAYER}.attn.q",
        k=f"{LAYER}.attn.k",
        v=f"{LAYER}.attn.v",
        o=f"{LAYER}.attn.out_proj",
        attention_sum_norm=f"{LAYER}.norm1",
        gate=f"{LAYER}.mlp.fc12",
        up=f"{LAYER}.mlp.fc11",
        down=f"{LAYER}.mlp.fc2",
        mlp_sum_norm=f"{LAYER}.norm2",
    ),
    heads={
        "NomicBertForMaskedLM": replace(MASK, norm="cls.predictions.transform.layer_norm"),
        **{name.replace("Bert", "NomicBert"): head for name, head in BERT.heads.items() if "Classification" in name},
    },
    layout=Layout(
        prefix="nomic_bert.",
        fused={f"{LAYER}.attn.Wqkv": ("q", "k", "v")},
        renamed=(
            ("cls.predictions.decoder.bias", "cls.predictions.bias"),
            ("cls.predictions.bias", "cls.predictions.decoder.bias"),
        ),
        unused=(*UNUSED, r"cls\.predictions\.(decoder\.)?bias"),
    ),
)
