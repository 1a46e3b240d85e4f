"""M2M-100 and NLLB: mBART without a norm of the embedding; computed positions begin after the padding's."""

from dataclasses import replace

from kbit.models.families.bart import STACK, both

FAMILY = both(
    replace(
        STACK,
        model_type="m2m_100",
        architectures=("M2M100ForConditionalGeneration", "M2M100Model"),
        defaults={**STACK.defaults, "activation_function": "relu", "scale_embedding": True},
        sinusoids="fairseq",
        first_position="pad",
        extra_positions=2,
        fixed={"normalize_before": (True,)},
    ),
    norms_first=True,
    embedding_norm=False,
)
