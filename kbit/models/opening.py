"""From what a user types to an open model whose tensors are canonical."""

from __future__ import annotations

from kbit.checkpoint import resolve
from kbit.checkpoint.source import CheckpointSource
from kbit.models.canonical import canonical
from kbit.models.wrapped import unwrapped


def open_model(model: str) -> CheckpointSource:
    """`kbit.checkpoint.resolve.open_model`: of several parts the language model, as canonical tensors."""
    source = resolve.open_model(model)
    try:
        return canonical(unwrapped(source))
    except BaseException:
        source.close()
        raise
