"""The reference backend's key/value cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kbit.backends.step import Step
from kbit.graph.cache import check_size, overflow
from kbit.host.errors import UsageError


class KVCache:
    """Keys and values of every layer as tensors (a `kbit.graph.cache.Cache`).

    All memory is taken when the cache is made, 2 * layers * B * H_kv * S * D elements. A forward pass writes its
    tokens layer by layer with `append` and makes them count with one `advance` at its end.

    Attributes:
        keys: per layer (B, H_kv, S, D), rotated.
        values: per layer (B, H_kv, S, D).
        lengths: int64 (B,), tokens in each row; slots beyond hold leftovers.
        capacity: S.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        kv_heads: int,
        head_dim: int,
        capacity: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """
        Raises:
            UsageError: batch or capacity below 1.
        """
        check_size(batch, capacity)
        shape = (batch, kv_heads, capacity, head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.capacity = capacity

    @property
    def batch(self) -> int:
        """B."""
        return self.lengths.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(part.numel() * part.element_size() for part in (*self.keys, *self.values))

    def reserve(self, new: torch.Tensor | Sequence[int]) -> None:
        """Check that new tokens fit: whole numbers (B,).

        Raises:
            UsageError: a row would exceed the capacity.
        """
        new = torch.as_tensor(new, dtype=torch.int64, device=self.lengths.device)
        after = self.lengths + new
        row = int(after.argmax())
        if int(after[row]) > self.capacity:
            raise overflow(self.capacity, row, int(self.lengths[row]), int(new[row]))

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor, step: Step) -> None:
        """Write a step's real tokens into one layer. `reserve` has checked that they fit.

        Args:
            layer: index of the layer.
            k: (B, T, H_kv, D), rotated.
            v: (B, T, H_kv, D).
            step: which of them are real, and their slots.
        """
        for store, new in ((self.keys[layer], k), (self.values[layer], v)):
            if step.real is None:
                assert step.shared_start is not None
                store[:, :, step.shared_start : step.shared_start + new.shape[1]] = new.transpose(1, 2)
            else:
                rows, columns, slots = step.real
                store[rows, :, slots] = new[rows, columns].to(store.dtype)  # (tokens, H_kv, D)

    def advance(self, new: torch.Tensor | Sequence[int]) -> None:
        """Count the tokens just written: whole numbers (B,)."""
        self.lengths = self.lengths + torch.as_tensor(new, dtype=torch.int64, device=self.lengths.device)

    def truncate(self, length: int | torch.Tensor) -> None:
        """Forget every token from position `length` on: an int for all rows, or int64 (B,). Shorter rows stay.

        Raises:
            UsageError: a negative length.
        """
        wanted = torch.as_tensor(length, dtype=torch.int64, device=self.lengths.device)
        if bool((wanted < 0).any()):
            raise UsageError(f"cannot truncate a cache to a negative length ({int(wanted.min())})")
        self.lengths = torch.minimum(self.lengths, wanted.expand_as(self.lengths))

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows, in this order: int64 (R,); a row may appear several times. Copies the cache.

        Raises:
            UsageError: no rows, or a row that does not exist.
        """
        rows = rows.to(self.lengths.device)
        if rows.ndim != 1 or rows.numel() == 0 or int(rows.min()) < 0 or int(rows.max()) >= self.batch:
            raise UsageError(f"rows {rows.tolist()} do not select from a cache of {self.batch} rows")
        for layer in range(len(self.keys)):
            self.keys[layer] = self.keys[layer][rows]
            self.values[layer] = self.values[layer][rows]
        self.lengths = self.lengths[rows]

    def grow(self, capacity: int) -> None:
        """Make room for `capacity` tokens per row, those in the cache kept. A capacity no larger changes nothing.

        Old and new arrays of a layer exist side by side while it is copied.
        """
        if capacity <= self.capacity:
            return
        for part in (self.keys, self.values):
            for layer, old in enumerate(part):
                part[layer] = old.new_zeros((*old.shape[:2], capacity, old.shape[3]))
                part[layer][:, :, : self.capacity] = old
        self.capacity = capacity
