"""BERT: a norm after every sum, tables of positions and token types, every token sees the whole text.

MiniLM, BGE, E5 and GTE are published as BERT.
"""

from kbit.models.family import Family
from kbit.models.layout import Layout
from kbit.models.task_heads import HIDDEN, TaskHead
from kbit.models.tensor_names import TensorNames

LAYER = "encoder.layer.{layer}"

NAMES = TensorNames(
    embedding="embeddings.word_embeddings",
    positions="embeddings.position_embeddings",
    types="embeddings.token_type_embeddings",
    embedding_norm="embeddings.LayerNorm",
    q=f"{LAYER}.attention.self.query",
    k=f"{LAYER}.attention.self.key",
    v=f"{LAYER}.attention.self.value",
    o=f"{LAYER}.attention.output.dense",
    attention_sum_norm=f"{LAYER}.attention.output.LayerNorm",
    gate=None,
    up=f"{LAYER}.intermediate.dense",
    down=f"{LAYER}.output.dense",
    mlp_sum_norm=f"{LAYER}.output.LayerNorm",
    final_norm=None,
    head="cls.predictions.decoder",
)

DEFAULTS = {
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
}

# Names of before 2019, and buffers and the pooler, which only some heads read.
OLD_NAMES = ((".gamma", ".weight"), (".beta", ".bias"))
UNUSED = (r"embeddings\.(position_ids|token_type_ids)", r"pooler\.dense\.(weight|bias)")

MASK = TaskHead(
    "mask",
    dense="cls.predictions.transform.dense",
    activation="config",
    norm="cls.predictions.transform.LayerNorm",
    out_bias="cls.predictions.bias",
)
TOKENS = TaskHead("tokens", out="classifier", out_bias="classifier.bias")
SPAN = TaskHead("span", out="qa_outputs", out_bias="qa_outputs.bias")

FAMILY = Family(
    model_type="bert",
    architectures=("BertModel",),
    defaults=DEFAULTS,
    qkv_bias=True,
    output_bias=True,
    mlp_bias=True,
    windows="none",
    names=NAMES,
    norm="layer",
    norm_bias=True,
    norm_eps="layer_norm_eps",
    mask="bidirectional",
    task=HIDDEN,
    heads={
        "BertForMaskedLM": MASK,
        "BertForPreTraining": MASK,
        "BertForSequenceClassification": TaskHead(
            "sequence", dense="pooler.dense", activation="tanh", out="classifier", out_bias="classifier.bias"
        ),
        "BertForTokenClassification": TOKENS,
        "BertForQuestionAnswering": SPAN,
    },
    layout=Layout(
        prefix="bert.",
        renamed=(
            *OLD_NAMES,
            ("cls.predictions.decoder.bias", "cls.predictions.bias"),
            ("cls.predictions.bias", "cls.predictions.decoder.bias"),
        ),
        unused=(*UNUSED, r"cls\.seq_relationship\.(weight|bias)", r"cls\.predictions\.(decoder\.)?bias"),
    ),
)
