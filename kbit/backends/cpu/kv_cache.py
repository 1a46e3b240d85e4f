"""The native backend's key/value cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kbit import _native
from kbit.graph.cache import whole_numbers


class NativeKVCache:
    """Keys and values in native memory (a `kbit.graph.cache.Cache`).

    Attributes:
        native: what programs read and write. It knows the lengths and refuses, with a UsageError, what does not fit.
    """

    def __init__(self, layers: int, batch: int, kv_heads: int, head_dim: int, capacity: int, kind: str) -> None:
        """
        Args:
            kind: what is stored: "fp32", "fp16", or bits of codes, "8", "4", "3" or "2".

        Raises:
            UsageError: batch or capacity below 1.
            MemoryError: there is no room for it.
        """
        self.native = _native.KVCache(layers, batch, kv_heads, head_dim, capacity, kind)

    @property
    def batch(self) -> int:
        """B."""
        return self.native.batch

    @property
    def capacity(self) -> int:
        """S: tokens a row has room for."""
        return self.native.capacity

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values, empty room included."""
        return self.native.nbytes

    @property
    def lengths(self) -> torch.Tensor:
        """int64 (B,), tokens in each row; a copy."""
        return torch.tensor(self.native.lengths(), dtype=torch.int64)

    def reserve(self, new: torch.Tensor | Sequence[int]) -> None:
        """Check that new tokens fit: whole numbers (B,).

        Raises:
            UsageError: a row would exceed the capacity.
        """
        self.native.reserve(whole_numbers(new))

    def advance(self, new: torch.Tensor | Sequence[int]) -> None:
        """Count the tokens just written: whole numbers (B,)."""
        self.native.advance(whole_numbers(new))

    def truncate(self, length: int | torch.Tensor) -> None:
        """Forget every token from position `length` on: an int for all rows, or int64 (B,). Shorter rows stay.

        Raises:
            UsageError: a negative length.
        """
        self.native.truncate([length] * self.batch if isinstance(length, int) else length.expand(self.batch).tolist())

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows, in this order: int64 (R,); a row may appear several times. Copies the cache.

        Raises:
            UsageError: no rows, or a row that does not exist.
        """
        self.native.select(rows.flatten().tolist())

    def grow(self, capacity: int) -> None:
        """Make room for `capacity` tokens per row, those in the cache kept. A capacity no larger changes nothing."""
        self.native.grow(capacity)
