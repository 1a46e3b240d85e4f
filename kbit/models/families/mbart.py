"""mBART: BART with norms before its blocks, and one at the end of each stack."""

from dataclasses import replace

from kbit.models.families.bart import STACK, both

FAMILY = both(
    replace(
        STACK,
        model_type="mbart",
        architectures=("MBartForConditionalGeneration", "MBartModel"),
        fixed={"normalize_before": (True,)},
    ),
    norms_first=True,
    embedding_norm=True,
)
