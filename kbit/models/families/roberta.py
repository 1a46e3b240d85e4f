"""RoBERTa: BERT with positions from the row after that of padding on.

XLM-RoBERTa (bge-m3, E5 multilingual) and CamemBERT are the same.
"""

from dataclasses import replace

from kbit.models.families.bert import FAMILY as BERT
from kbit.models.families.bert import NAMES, OLD_NAMES, SPAN, TOKENS, UNUSED
from kbit.models.layout import Layout
from kbit.models.task_heads import TaskHead

# (`lm_head.dense` and its like do not have the model's prefix.)
MASK = TaskHead("mask", dense="lm_head.dense", activation="gelu", norm="lm_head.layer_norm", out_bias="lm_head.bias")
SEQUENCE = TaskHead(
    "sequence",
    dense="classifier.dense",
    activation="tanh",
    out="classifier.out_proj",
    out_bias="classifier.out_proj.bias",
)
LAYOUT = Layout(
    prefix="roberta.",
    renamed=(*OLD_NAMES, ("lm_head.decoder.bias", "lm_head.bias"), ("lm_head.bias", "lm_head.decoder.bias")),
    unused=(*UNUSED, r"lm_head\.(decoder\.)?bias"),
)


def _named(prefix: str) -> dict[str, TaskHead]:
    heads = {
        "MaskedLM": MASK,
        "SequenceClassification": SEQUENCE,
        "TokenClassification": TOKENS,
        "QuestionAnswering": SPAN,
    }
    return {f"{prefix}For{task}": head for task, head in heads.items()}


FAMILY = replace(
    BERT,
    model_type="roberta",
    architectures=("RobertaModel",),
    defaults={**BERT.defaults, "pad_token_id": 1},
    names=replace(NAMES, head="lm_head.decoder"),
    first_position="pad",
    heads=_named("Roberta"),
    layout=LAYOUT,
)
XLM_ROBERTA = replace(FAMILY, model_type="xlm-roberta", architectures=("XLMRobertaModel",), heads=_named("XLMRoberta"))
CAMEMBERT = replace(FAMILY, model_type="camembert", architectures=("CamembertModel",), heads=_named("Camembert"))
