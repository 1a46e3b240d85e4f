"""mT5: T5 1.1 with another vocabulary, whose logits are never scaled; and UMT5, with distances in every block."""

from dataclasses import replace

from kbit.models.families.t5 import ENCODER_NAMES, NAMES
from kbit.models.families.t5 import FAMILY as T5

assert T5.encoder is not None
_DEFAULTS = {**T5.defaults, "feed_forward_proj": "gated-gelu"}

FAMILY = replace(
    T5,
    model_type="mt5",
    architectures=("MT5ForConditionalGeneration",),
    defaults=_DEFAULTS,
    scaled_logits=None,
    encoder=replace(T5.encoder, defaults=_DEFAULTS),
)

UMT5 = replace(
    T5,
    model_type="umt5",
    architectures=("UMT5ForConditionalGeneration",),
    defaults=_DEFAULTS,
    names=replace(NAMES, distances=str(NAMES.distances).replace("block.0.", "block.{layer}.")),
    encoder=replace(
        T5.encoder,
        defaults=_DEFAULTS,
        names=replace(ENCODER_NAMES, distances=str(ENCODER_NAMES.distances).replace("block.0.", "block.{layer}.")),
    ),
)
