"""Pegasus: mBART without a norm of the embedding, and with computed positions."""

from dataclasses import replace

from kbit.models.families.bart import STACK, both

FAMILY = both(
    replace(
        STACK,
        model_type="pegasus",
        architectures=("PegasusForConditionalGeneration", "PegasusModel"),
        defaults={**STACK.defaults, "pad_token_id": 0},
        sinusoids="marian",
        first_position=0,
        extra_positions=0,
        fixed={"normalize_before": (True,)},
    ),
    norms_first=True,
    embedding_norm=False,
)
