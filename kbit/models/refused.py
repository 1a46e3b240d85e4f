"""Model types that people bring and kbit does not run, and what each would need."""

from __future__ import annotations

REASONS = {
    "deberta": "its attention has matrices of its own for distances",
    "deberta-v2": "its attention has matrices of its own for distances",
    "deepseek_v32": "a further part of its attention chooses the tokens that are attended to",
    "gemma3n": "it has several residual streams (AltUp), and MLPs of which a share of the features is left out",
    "gemma3n_text": "it has several residual streams (AltUp), and MLPs of which a share of the features is left out",
}


def reason(model_type: str) -> str:
    """Why a model type is not supported, to be put behind that it is not; "" where no more is known."""
    return f" ({REASONS[model_type]})" if model_type in REASONS else ""
