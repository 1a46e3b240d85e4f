"""DistilBERT: BERT of half the layers, without token types, and with names of its own."""

from dataclasses import replace

from kbit.models.families.bert import FAMILY as BERT
from kbit.models.families.bert import OLD_NAMES, SPAN, TOKENS
from kbit.models.layout import Layout
from kbit.models.task_heads import TaskHead
from kbit.models.tensor_names import TensorNames

LAYER = "transformer.layer.{layer}"

FAMILY = replace(
    BERT,
    model_type="distilbert",
    architectures=("DistilBertModel",),
    # The epsilon is no key of these configurations.
    defaults={
        "activation": "gelu",
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "tie_word_embeddings": True,
    },
    keys={
        "hidden_size": "dim",
        "intermediate_size": "hidden_dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
    },
    activation="activation",
    names=TensorNames(
        embedding="embeddings.word_embeddings",
        positions="embeddings.position_embeddings",
        embedding_norm="embeddings.LayerNorm",
        q=f"{LAYER}.attention.q_lin",
        k=f"{LAYER}.attention.k_lin",
        v=f"{LAYER}.attention.v_lin",
        o=f"{LAYER}.attention.out_lin",
        attention_sum_norm=f"{LAYER}.sa_layer_norm",
        gate=None,
        up=f"{LAYER}.ffn.lin1",
        down=f"{LAYER}.ffn.lin2",
        mlp_sum_norm=f"{LAYER}.output_layer_norm",
        final_norm=None,
        head="vocab_projector",
    ),
    heads={
        "DistilBertForMaskedLM": TaskHead(
            "mask",
            dense="vocab_transform",
            activation="config",
            norm="vocab_layer_norm",
            out_bias="vocab_projector.bias",
        ),
        "DistilBertForSequenceClassification": TaskHead(
            "sequence", dense="pre_classifier", activation="relu", out="classifier", out_bias="classifier.bias"
        ),
        "DistilBertForTokenClassification": TOKENS,
        "DistilBertForQuestionAnswering": SPAN,
    },
    layout=Layout(prefix="distilbert.", renamed=OLD_NAMES, unused=(r"embeddings\.position_ids",)),
)
