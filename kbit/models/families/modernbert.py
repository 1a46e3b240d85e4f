"""ModernBERT: norms before blocks, but none before the first attention; a gated MLP; two layers of three see a window
to both sides, with a rotation of their own."""

from dataclasses import replace

from kbit.models.family import Family
from kbit.models.layout import Layout
from kbit.models.rope_config import RopeRules
from kbit.models.task_heads import HIDDEN, TaskHead
from kbit.models.tensor_names import TensorNames

LAYER = "layers.{layer}"
_OUT = TaskHead(
    "tokens",
    dense="head.dense",
    activation="config",
    norm="head.norm",
    out="classifier",
    out_bias="classifier.bias",
)

FAMILY = Family(
    model_type="modernbert",
    architectures=("ModernBertModel",),
    defaults={
        "hidden_activation": "gelu",
        "norm_eps": 1e-5,
        "norm_bias": False,
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": 8192,
        "sliding_window": 128,
        "global_attn_every_n_layers": 3,
        "tie_word_embeddings": True,
        "decoder_bias": True,
        "classifier_bias": False,
        "classifier_pooling": "cls",
        "classifier_activation": "gelu",
    },
    keys={"sliding_window": "local_attention", "rope_theta": "global_rope_theta"},
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    mlp_bias="mlp_bias",
    windows="period from 0",
    window_period="global_attn_every_n_layers",
    rope=RopeRules(theta=160000.0, kinds=("default",), by_layer_type=True, window_theta=("local_rope_theta", 1e4)),
    activation="hidden_activation",
    names=TensorNames(
        embedding="embeddings.tok_embeddings",
        embedding_norm="embeddings.norm",
        attention_norm=f"{LAYER}.attn_norm",
        q=f"{LAYER}.attn.q",
        k=f"{LAYER}.attn.k",
        v=f"{LAYER}.attn.v",
        o=f"{LAYER}.attn.Wo",
        mlp_norm=f"{LAYER}.mlp_norm",
        gate=f"{LAYER}.mlp.gate",
        up=f"{LAYER}.mlp.up",
        down=f"{LAYER}.mlp.Wo",
        final_norm="final_norm",
        head="decoder",
    ),
    norm="layer",
    norm_bias="norm_bias",
    norm_eps="norm_eps",
    mask="bidirectional",
    unnormed=(0,),
    task=HIDDEN,
    heads={
        "ModernBertForMaskedLM": replace(_OUT, kind="mask", out=None, out_bias="decoder.bias"),
        "ModernBertForSequenceClassification": replace(_OUT, kind="sequence"),
        "ModernBertForTokenClassification": _OUT,
        "ModernBertForQuestionAnswering": replace(_OUT, kind="span"),
    },
    layout=Layout(
        prefix="model.",
        fused={f"{LAYER}.attn.Wqkv": ("q", "k", "v"), f"{LAYER}.mlp.Wi": ("gate", "up")},
    ),
)
