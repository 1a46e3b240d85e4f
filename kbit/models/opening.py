"""From what a user types to an open model whose tensors are canonical."""

from __future__ import annotations

from kbit.checkpoint import resolve
from kbit.checkpoint.source import CheckpointSource
from kbit.models.canonical import canonical


def open_model(model: str) -> CheckpointSource:
    """`kbit.checkpoint.resolve.open_model`, as canonical tensors (`kbit.models.canonical`)."""
    source = resolve.open_model(model)
    try:
        return canonical(source)
    except BaseException:
        source.close()
        raise
