"""Model types that people bring and kbit does not run, and what each would need."""

from __future__ import annotations

REASONS = {
    "phimoe": "its router chooses experts one after another, each by a softmax of those near the best (SparseMixer)",
    "apertus": "its activation, xIELU, has parameters of its own in every layer",
    "bitnet": "it has norms inside of attention and MLP, and rounds activations",
    "llama4_text": "its attention is in chunks, and its router scales what goes into experts",
    "llama4": "its attention is in chunks, and its router scales what goes into experts",
}


def reason(model_type: str) -> str:
    """Why a model type is not supported, to be put behind that it is not; "" where no more is known."""
    return f" ({REASONS[model_type]})" if model_type in REASONS else ""
