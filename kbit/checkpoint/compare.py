"""Comparing tensors of one checkpoint."""

from __future__ import annotations

from kbit.checkpoint.source import CheckpointSource, StoredSource

# Values of each that are held at once.
_VALUES = 1 << 20


def same_values(source: CheckpointSource, one: str, other: str) -> bool:
    """Whether two matrices of one shape hold the same values, a few rows at a time. Of files without torch."""
    import numpy as np

    rows, columns = source.tensors[one].shape
    step = max(1, _VALUES // max(1, columns))
    read = source.read_array_rows if isinstance(source, StoredSource) else source.read_rows
    return all(
        np.array_equal(read(one, start, stop), read(other, start, stop))
        for start, stop in ((start, min(start + step, rows)) for start in range(0, rows, step))
    )
