"""Where the rows of a head are published that canonical tensors have in rotate-half order, what turns first."""

from __future__ import annotations

from kbit.models.layout import Layout
from kbit.models.spec import ModelSpec


def head_order(spec: ModelSpec, layout: Layout, slot: str) -> tuple[int, ...]:
    """The published row, within its head, of every canonical row of a head: (rows of a head,).

    Args:
        spec: the model.
        layout: its family's.
        slot: of a matrix or its bias.

    Returns:
        Empty where rows are published in the order they have, or make no heads.
    """
    turned = spec.rope.dim
    if slot == "q" or (slot == "k" and spec.latent is None):
        head = spec.head_dim
    elif slot == "k_shared":
        head = turned
    else:
        return ()
    aside = head - turned if layout.turned_last else 0
    half = turned // 2
    rows = [aside + (2 * row if row < half else 2 * (row - half) + 1) for row in range(turned)]
    if not layout.interleaved:
        rows = list(range(aside, aside + turned))
    rows += range(aside) if aside else range(turned, head)
    return () if rows == list(range(head)) else tuple(rows)
