"""Cache: what a key/value cache can do, whoever keeps it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from kbit.host.errors import UsageError

if TYPE_CHECKING:
    import torch


class Cache(Protocol):
    """Keys and values of a batch of sequences, with room for a fixed number of tokens per row.

    Only the backend that made it can read it. A forward pass writes its tokens layer by layer and makes them count at
    its end, so a pass that fails midway leaves the cache as it was.
    """

    @property
    def batch(self) -> int:
        """B: rows."""

    @property
    def capacity(self) -> int:
        """S: tokens a row has room for."""

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values, empty room included."""

    @property
    def lengths(self) -> torch.Tensor:
        """Tokens in each row: int64 (B,). Not to be written to."""

    def reserve(self, new: torch.Tensor | Sequence[int]) -> None:
        """Check that new tokens fit: whole numbers (B,).

        Raises:
            UsageError: a row would exceed the capacity.
        """

    def advance(self, new: torch.Tensor | Sequence[int]) -> None:
        """Count tokens that were just written: whole numbers (B,)."""

    def truncate(self, length: int | torch.Tensor) -> None:
        """Forget every token from position `length` on: an int for all rows, or int64 (B,). Shorter rows stay.

        Raises:
            UsageError: a negative length.
        """

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows, in this order: int64 (R,); a row may appear several times. Copies the cache.

        Raises:
            UsageError: no rows, or a row that does not exist.
        """

    def grow(self, capacity: int) -> None:
        """Make room for `capacity` tokens per row, those in the cache kept. A capacity no larger changes nothing."""


def check_size(batch: int, capacity: int) -> None:
    """
    Raises:
        UsageError: a cache of no rows, or with no room.
    """
    if batch < 1 or capacity < 1:
        raise UsageError(f"a cache needs at least 1 row and 1 token per row, not {batch} and {capacity}")


def overflow(capacity: int, row: int, length: int, more: int) -> UsageError:
    """What to raise where a row of `length` tokens has no room for `more`."""
    return UsageError(
        f"the KV cache holds {capacity} tokens per row: row {row} has {length} and {more} more do not fit; make the "
        "cache larger or the text shorter"
    )


def whole_numbers(new: torch.Tensor | Sequence[int]) -> Sequence[int]:
    """Counts of tokens per row, as a cache is given them, on the host."""
    if isinstance(new, Sequence):
        return new
    numbers: list[int] = new.tolist()
    return numbers
