"""Cache: keys and values of some sequences, in pages of a pool, whoever keeps the bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kbit.graph.block_table import BlockTable
from kbit.graph.pages import PagePool, pages_for
from kbit.host.errors import UsageError

_MOST_TOKENS = (1 << 31) - 128  # positions are 32-bit numbers, rounded up to whole blocks of attention


class HasToList(Protocol):
    """An array of whole numbers: numpy's, torch's, or another's."""

    def tolist(self) -> list[int]:
        """Its numbers."""


class Cache:
    """The sequences a forward pass goes on with: a block table for each, and how many tokens it may have.

    Only the backend that made the pool can read it. A forward pass writes its tokens layer by layer and makes them
    count at its end, so a pass that fails midway leaves the cache as it was.

    Args:
        pool: where the rows' pages are.
        rows: the sequences, B of them.
        capacity: tokens a row may have.
        private: the pool has nothing else in it, and is made larger when this cache is.
        encoder: the cache, of as many rows, where an encoder left what this one's rows attend to besides themselves.

    Attributes:
        pool, rows, capacity, private, encoder: as given.
    """

    def __init__(
        self,
        pool: PagePool,
        rows: Sequence[BlockTable],
        capacity: int,
        *,
        private: bool = False,
        encoder: Cache | None = None,
    ) -> None:
        check_size(len(rows), capacity)
        if encoder is not None and encoder.batch != len(rows):
            raise UsageError(f"{len(rows)} sequences do not go with {encoder.batch} texts of an encoder")
        self.pool = pool
        self.rows = list(rows)
        self.capacity = capacity
        self.private = private
        self.encoder = encoder
        self._tables = np.empty((0, 0), dtype=np.int32)
        self._versions: list[tuple[int, int]] = []

    @staticmethod
    def alone(pool: PagePool, batch: int, capacity: int) -> Cache:
        """`batch` empty sequences with a pool of their own, which must be new."""
        return Cache(pool, [BlockTable(pool) for _ in range(batch)], capacity, private=True)

    @property
    def batch(self) -> int:
        """B."""
        return len(self.rows)

    @property
    def nbytes(self) -> int:
        """Bytes of the pool, empty room included."""
        return self.pool.nbytes

    @property
    def lengths(self) -> NDArray[np.int64]:
        """int64 (B,), tokens in each row; a copy."""
        return np.array([row.length for row in self.rows], dtype=np.int64)

    @property
    def tables(self) -> NDArray[np.int32]:
        """int32 (B, pages of `capacity` tokens): the pages of each row, and -1. Not to be written to."""
        versions = [(id(row), row.version) for row in self.rows]
        shape = (len(self.rows), pages_for(self.capacity))
        if shape != self._tables.shape:
            self._tables, self._versions = np.full(shape, -1, dtype=np.int32), [(0, -1)] * len(versions)
        if versions != self._versions:
            tables = self._tables.copy()  # a pass that was given the last one may be under way
            for index, (old, new) in enumerate(zip(self._versions, versions, strict=True)):
                if old != new:
                    pages = self.rows[index].pages
                    tables[index, : len(pages)] = pages
                    tables[index, len(pages) :] = -1
            self._tables, self._versions = tables, versions
        return self._tables

    def reserve(self, new: HasToList | Sequence[int]) -> None:
        """Makes room for new tokens: whole numbers (B,).

        Raises:
            UsageError: a row would exceed the capacity.
            OutOfPagesError: other sequences have the pages.
        """
        counts = self._per_row(new, "reserve")
        for index, (row, more) in enumerate(zip(self.rows, counts, strict=True)):
            if row.length + more > self.capacity:
                raise UsageError(
                    f"the KV cache holds {self.capacity} tokens per row: row {index} has {row.length} and {more} more "
                    "do not fit; make the cache larger or the text shorter"
                )
        if self.private and self.pool.states is not None:
            self.pool.states.spare(self.batch)
        for row, more in zip(self.rows, counts, strict=True):
            row.reserve(more)

    def advance(self, new: HasToList | Sequence[int]) -> None:
        """Counts the tokens just written where `reserve` made room: whole numbers (B,)."""
        for row, more in zip(self.rows, self._per_row(new, "advance"), strict=True):
            row.advance(more)

    def truncate(self, length: int | HasToList | Sequence[int]) -> None:
        """Forgets every token from position `length` on: one number for all rows, or (B,). Shorter rows stay.

        Raises:
            UsageError: a negative length; states that were not kept there (`BlockTable.truncate`).
        """
        lengths = [length] * self.batch if isinstance(length, int) else self._per_row(length, "truncate")
        if min(lengths) < 0:
            raise UsageError(f"cannot truncate a cache to a negative length ({min(lengths)})")
        for row, most in zip(self.rows, lengths, strict=True):
            row.check_kept(most)
        for row, most in zip(self.rows, lengths, strict=True):
            row.truncate(most)

    def kept_before(self, length: int) -> int:
        """How many tokens, `length` at most, `truncate` can leave of a cache of one row (`BlockTable.kept_before`)."""
        (row,) = self.rows
        return row.kept_before(length)

    def forget(self, length: int) -> None:
        """Gives back what `snapshot` kept when every row had so many tokens."""
        for row in self.rows:
            row.forget(length)

    def snapshot(self) -> None:
        """Keeps every row's states of fixed size as they are, to go back to (`BlockTable.snapshot`)."""
        for row in self.rows:
            row.snapshot()

    def select(self, rows: HasToList | Sequence[int]) -> None:
        """Keeps these rows, in this order: whole numbers (R,); a row may appear several times. Pages are shared then.

        Raises:
            UsageError: no rows, or a row that does not exist.
        """
        chosen = whole_numbers(rows)
        if not chosen or min(chosen) < 0 or max(chosen) >= self.batch:
            raise UsageError(f"rows {list(chosen)} do not select from a cache of {self.batch} rows")
        if self.private:
            self.pool.ensure(len(chosen) * pages_for(self.capacity))
        taken: set[int] = set()
        selected = []
        for index in chosen:
            selected.append(self.rows[index].fork() if index in taken else self.rows[index])
            taken.add(index)
        for index, row in enumerate(self.rows):
            if index not in taken:
                row.release()
        self.rows = selected
        if self.encoder is not None:
            self.encoder.select(chosen)

    def grow(self, capacity: int) -> None:
        """Room for `capacity` tokens per row, those in the cache kept. A capacity no larger changes nothing."""
        if capacity > self.capacity:
            check_size(self.batch, capacity)
            if self.private:
                self.pool.ensure(self.batch * pages_for(capacity))
            self.capacity = capacity

    def _per_row(self, values: HasToList | Sequence[int], what: str) -> Sequence[int]:
        numbers = whole_numbers(values)
        if len(numbers) != self.batch:
            raise UsageError(f"{what} takes one number per row of the cache: {self.batch}, not {len(numbers)}")
        return numbers


def encoder_lengths(cache: Cache, counts: NDArray[np.int64]) -> tuple[Cache, NDArray[np.int64]]:
    """The cache that cross attention reads, and the length of each row's text in it, int64 (B,).

    Args:
        counts: int64 (B,), tokens of each row that attend.

    Raises:
        UsageError: there is none, or no text for a row that attends.
    """
    if cache.encoder is None:
        raise UsageError("this model attends to an encoder's text, and the cache has none")
    lengths = cache.encoder.lengths
    if ((lengths == 0) & (counts > 0)).any():
        raise UsageError("a sequence attends to an encoder's text that has no tokens")
    return cache.encoder, lengths


def check_size(batch: int, capacity: int) -> None:
    """
    Raises:
        UsageError: a cache of no rows, with no room, or with more than positions can count.
    """
    if batch < 1 or capacity < 1:
        raise UsageError(f"a cache needs at least 1 row and 1 token per row, not {batch} and {capacity}")
    if capacity > _MOST_TOKENS:
        raise UsageError(f"a cache holds fewer than 2^31 tokens per row, not {capacity}")


def whole_numbers(values: HasToList | Sequence[int]) -> Sequence[int]:
    """Numbers as a list or tuple, from one or from an array on any device."""
    return values if isinstance(values, Sequence) else values.tolist()
