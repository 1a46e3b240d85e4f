"""Where rows of a published matrix are that holds several by group: some rows of each, then those of the next group."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kbit.models.head_order import head_order
from kbit.models.layout import Layout
from kbit.models.spec import ModelSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def grouped_rows(spec: ModelSpec, layout: Layout, template: str) -> dict[str, NDArray[np.int64]]:
    """Of every canonical tensor the published row of each of its rows.

    Args:
        spec: the model.
        layout: its family's.
        template: the published name, of `layout.grouped`.

    Returns:
        By slot, int64 (N,).
    """
    import numpy as np

    grouped = layout.grouped[template]
    groups, within = _sizes(spec, grouped.by)
    begins = np.arange(groups) * sum(sum(within[slot]) for slot in grouped.slots)
    found, first = {}, 0
    for slot in grouped.slots:
        parts = []
        for count in within[slot]:
            parts.append((begins[:, None] + first + np.arange(count)).reshape(-1))
            first += count
        rows = np.concatenate(parts)
        if order := head_order(spec, layout, slot):
            rows = rows.reshape(-1, len(order))[:, np.array(order)].reshape(-1)
        found[slot] = rows
    return found


def _sizes(spec: ModelSpec, by: str) -> tuple[int, dict[str, tuple[int, ...]]]:
    """How many groups there are, and how many rows of each slot's parts each has."""
    queries = spec.heads * spec.head_dim
    if by == "quarters":
        return 4, dict.fromkeys(("q", "k", "v"), (queries // 4,))
    if by == "key/value heads":
        one = spec.head_dim
        return spec.kv_heads, {"q": (queries // spec.kv_heads,), "k": (one,), "v": (one,)}
    delta = spec.delta
    assert delta is not None
    shared = delta.heads // delta.key_heads
    values = shared * delta.value_dim
    return delta.key_heads, {
        "delta_qkv": (delta.key_dim, delta.key_dim, values),
        "delta_z": (values,),
        "delta_write": (shared,),
        "delta_decay": (shared,),
    }
