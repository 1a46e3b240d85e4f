"""From what a user types to an open model whose tensors are canonical."""

from __future__ import annotations

from kbit.checkpoint import resolve
from kbit.checkpoint.narrowed import narrowed
from kbit.checkpoint.source import CheckpointSource
from kbit.models.canonical import canonical
from kbit.models.tied import embedded
from kbit.models.wrapped import unwrapped


def open_model(model: str, bits: float | None = None) -> CheckpointSource:
    """`kbit.checkpoint.resolve.open_model`: of several parts the language model, as canonical tensors.

    Args:
        model: as a user names it.
        bits: to read a nested model at; None: its widest.

    Raises:
        UsageError: the model does not serve so many bits.
    """
    source = resolve.open_model(model)
    try:
        opened = canonical(embedded(unwrapped(source)))
        return opened if bits is None else narrowed(opened, bits)
    except BaseException:
        source.close()
        raise
