"""Cohere 2: Command R7B and A. Cohere's, with windows in all layers but every fourth, which alone does not rotate."""

from dataclasses import replace

from kbit.models.families.cohere import FAMILY as COHERE
from kbit.models.rope_config import RopeRules

FAMILY = replace(
    COHERE,
    model_type="cohere2",
    architectures=("Cohere2ForCausalLM",),
    defaults={**COHERE.defaults, "sliding_window": 4096, "sliding_window_pattern": 4},
    rope=RopeRules(),
    windows="period",
    window_period="sliding_window_pattern",
    rotated="slid",
)
