"""A checkpoint with NaN or infinity in it is refused where it is read, by name, and not run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kbit.checkpoint.source import CheckpointSource, StoredSource
from kbit.formats.stored import KINDS, AnyStored, StoredMatrix, is_finite, widened
from kbit.host.errors import CheckpointError

if TYPE_CHECKING:
    from numpy.typing import NDArray


def read_stored(source: StoredSource, name: str) -> AnyStored:
    """`StoredSource.read_stored`, checked.

    Raises:
        CheckpointError: the tensor cannot be read, or holds NaN or infinity.
    """
    stored = source.read_stored(name)
    if isinstance(stored, StoredMatrix):
        parts = stored.format.parts(*stored.shape)
        for part, array in stored.parts.items():
            if parts[part].dtype in KINDS:
                _check(source, name, array, KINDS[parts[part].dtype])
        _check(source, name, stored.codebook, "fp32")
    else:
        _check(source, name, stored.values, stored.kind)
    return stored


def read_array(source: StoredSource, name: str) -> NDArray[np.float32]:
    """`StoredSource.read_array`, checked: see read_stored."""
    array = source.read_array(name)
    _check(source, name, array, "fp32")
    return array


def _check(source: StoredSource, name: str, array: NDArray[Any], kind: str) -> None:
    if not is_finite(array, kind):
        values = widened(array, kind)
        raise not_finite(source, name, int(np.isnan(values).sum()), int(np.isinf(values).sum()))


def not_finite(source: CheckpointSource, name: str, nans: int, infinities: int) -> CheckpointError:
    """What to raise where a tensor holds so many values that are no numbers."""
    return CheckpointError(
        f"{source.path}: {name} holds {nans} NaN and {infinities} infinite values; the checkpoint is damaged or "
        "overflowed when it was converted; get it again"
    )
