"""MPNet: BERT without token types, whose scores have T5's relative positions, one table for all layers."""

from dataclasses import replace

from kbit.models.families.bert import FAMILY as BERT
from kbit.models.families.bert import NAMES, OLD_NAMES, SPAN, TOKENS, UNUSED
from kbit.models.families.roberta import MASK, SEQUENCE
from kbit.models.layout import Layout

LAYER = "encoder.layer.{layer}.attention"

# The farthest distance and the row of padding are no keys of these configurations, and transformers reads the number of
# buckets for the table alone, so other numbers are refused.
FAMILY = replace(
    BERT,
    model_type="mpnet",
    architectures=("MPNetModel",),
    defaults={**BERT.defaults, "pad_token_id": 1},
    names=replace(
        NAMES,
        types=None,
        distances="encoder.relative_attention_bias",
        q=f"{LAYER}.attn.q",
        k=f"{LAYER}.attn.k",
        v=f"{LAYER}.attn.v",
        o=f"{LAYER}.attn.o",
        attention_sum_norm=f"{LAYER}.LayerNorm",
        head="lm_head.decoder",
    ),
    first_position=2,
    distances=(32, 128),
    heads={
        "MPNetForMaskedLM": MASK,
        "MPNetForSequenceClassification": SEQUENCE,
        "MPNetForTokenClassification": TOKENS,
        "MPNetForQuestionAnswering": SPAN,
    },
    layout=Layout(
        prefix="mpnet.",
        renamed=(*OLD_NAMES, ("lm_head.decoder.bias", "lm_head.bias"), ("lm_head.bias", "lm_head.decoder.bias")),
        unused=(*UNUSED, r"lm_head\.(decoder\.)?bias"),
    ),
)
