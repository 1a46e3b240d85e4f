"""The Triton backend's key/value cache: pages on the device, lengths on the host."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from kbit.graph.cache import check_size, overflow, whole_numbers
from kbit.host.errors import UsageError
from kbit.kernels.triton.attention.kv_layout import PAGE, KVFormat, new_pages, pages_for


class TritonKVCache:
    """Keys and values in pages of 64 tokens (a `kbit.graph.cache.Cache`).

    All pages are taken when the cache is made or grown. Lengths are kept on the host, so nothing ever waits for the
    device to tell them.

    Attributes:
        keys: per layer uint8 (P, H_kv, bytes of a page), `kbit.kernels.triton.attention.kv_layout`.
        values: likewise.
        block_table: int32 (B, pages of a row), which pages a row owns.
        k_kind, v_kind: what is stored, one of kv_layout.KINDS.
        version: changes when keys, values or block_table are other tensors than before.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        kv_heads: int,
        head_dim: int,
        capacity: int,
        *,
        k_kind: str = "fp16",
        v_kind: str = "fp16",
        device: torch.device | str = "cuda",
    ) -> None:
        """
        Raises:
            UsageError: batch or capacity below 1.
            UnsupportedError: a kind, or heads, that the kernels do not have.
        """
        check_size(batch, capacity)
        self.k_kind, self.v_kind = k_kind, v_kind
        k_format, v_format = KVFormat(k_kind, head_dim), KVFormat(v_kind, head_dim)
        row_pages = pages_for(capacity)
        pages = batch * row_pages
        self.keys = [new_pages(pages, kv_heads, k_format, device) for _ in range(layers)]
        self.values = [new_pages(pages, kv_heads, v_format, device) for _ in range(layers)]
        # Rows own runs of pages, one after the other (`slots` relies on it).
        self.block_table = torch.arange(pages, dtype=torch.int32, device=device).view(batch, row_pages)
        self.version = 0
        self._capacity = capacity
        self._lengths = [0] * batch

    @property
    def batch(self) -> int:
        """B."""
        return len(self._lengths)

    @property
    def capacity(self) -> int:
        """S: tokens a row has room for."""
        return self._capacity

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values, empty room included."""
        return sum(part.numel() for part in (*self.keys, *self.values))

    @property
    def lengths(self) -> torch.Tensor:
        """int64 (B,) on the host, tokens in each row; a copy."""
        return torch.tensor(self._lengths, dtype=torch.int64)

    def host_lengths(self) -> list[int]:
        """The same as a list; a copy."""
        return list(self._lengths)

    def slots(self, rows: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where tokens lie: page * 64 + place within it, for tokens of these rows at these positions, (N,) each."""
        return rows * (self.block_table.shape[1] * PAGE) + positions

    def reserve(self, new: torch.Tensor | Sequence[int]) -> None:
        """Check that new tokens fit: whole numbers (B,).

        Raises:
            UsageError: a row would exceed the capacity.
        """
        for row, (length, more) in enumerate(zip(self._lengths, whole_numbers(new), strict=True)):
            if length + more > self._capacity:
                raise overflow(self._capacity, row, length, more)

    def advance(self, new: torch.Tensor | Sequence[int]) -> None:
        """Count the tokens just written: whole numbers (B,)."""
        self._lengths = [length + more for length, more in zip(self._lengths, whole_numbers(new), strict=True)]

    def truncate(self, length: int | torch.Tensor) -> None:
        """Forget every token from position `length` on: an int for all rows, or int64 (B,). Shorter rows stay.

        Raises:
            UsageError: a negative length.
        """
        wanted = [length] * self.batch if isinstance(length, int) else length.expand(self.batch).tolist()
        if min(wanted) < 0:
            raise UsageError(f"cannot truncate a cache to a negative length ({min(wanted)})")
        self._lengths = [min(old, new) for old, new in zip(self._lengths, wanted, strict=True)]

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows, in this order: int64 (R,); a row may appear several times. Copies the pages that are used.

        Raises:
            UsageError: no rows, or a row that does not exist.
        """
        chosen = rows.tolist() if rows.ndim == 1 else []
        if not chosen or min(chosen) < 0 or max(chosen) >= self.batch:
            raise UsageError(f"rows {rows.tolist()} do not select from a cache of {self.batch} rows")
        self._rearrange(chosen, self.block_table.shape[1])
        self._lengths = [self._lengths[row] for row in chosen]

    def grow(self, capacity: int) -> None:
        """Make room for `capacity` tokens per row, those in the cache kept. A capacity no larger changes nothing.

        Old and new pages of a layer exist side by side while they are copied.
        """
        if capacity <= self._capacity:
            return
        if pages_for(capacity) > self.block_table.shape[1]:
            self._rearrange(list(range(self.batch)), pages_for(capacity))
        self._capacity = capacity

    def _rearrange(self, rows: list[int], row_pages: int) -> None:
        """New pages for these rows of the old ones, `row_pages` each."""
        used = max(1, pages_for(max(self._lengths[row] for row in rows)))
        source = self.block_table[rows, :used].long()  # (R, used)
        pages = len(rows) * row_pages
        table = torch.arange(pages, dtype=torch.int32, device=self.block_table.device).view(len(rows), row_pages)
        target = table[:, :used].long()
        for part in (self.keys, self.values):
            for layer, old in enumerate(part):
                part[layer] = old.new_zeros((pages, *old.shape[1:]))
                part[layer][target.flatten()] = old[source.flatten()]
        self.block_table = table
        self.version += 1
