"""The Triton backend's caches: pages on the device, the books on the host."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from kbit.graph.cache import Cache
from kbit.graph.pages import PAGE, PerLayer, of_layers
from kbit.kernels.triton.attention.kv_layout import KVFormat, new_pages


class TritonPages:
    """Keys and values of every layer in pages (a `kbit.graph.pages.PageStore`). All memory is taken at once.

    Attributes:
        keys: per layer uint8 (P, H_kv, bytes of a page), `kbit.kernels.triton.attention.kv_layout`.
        values: likewise.
        k_kind, v_kind: what is stored, one of kv_layout.KINDS.
        version: changes when keys and values are other tensors than before.

    Raises:
        UnsupportedError: a kind, or heads, that the kernels do not have.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: PerLayer,
        head_dim: PerLayer,
        pages: int,
        *,
        k_kind: str = "fp16",
        v_kind: str = "fp16",
        device: torch.device | str = "cuda",
    ) -> None:
        self.k_kind, self.v_kind = k_kind, v_kind
        heads = list(zip(of_layers(kv_heads, layers), of_layers(head_dim, layers), strict=True))
        self.keys = [new_pages(pages, count, KVFormat(k_kind, dim), device) for count, dim in heads]
        self.values = [new_pages(pages, count, KVFormat(v_kind, dim), device) for count, dim in heads]
        self.version = 0

    @property
    def count(self) -> int:
        """P."""
        return self.keys[0].shape[0]

    @property
    def page_bytes(self) -> int:
        """Bytes of a page, all layers."""
        return sum(part[0].numel() for part in (*self.keys, *self.values))

    def resize(self, count: int) -> None:
        """Memory for `count` pages. Old and new pages of a layer exist side by side while they are copied."""
        for part in (self.keys, self.values):
            for layer, old in enumerate(part):
                part[layer] = old.new_zeros((count, *old.shape[1:]))
                part[layer][: len(old)] = old
        self.version += 1

    def copy(self, source: int, target: int) -> None:
        """Makes page `target` the same as `source`."""
        for part in (*self.keys, *self.values):
            part[target] = part[source]


def triton_pages(cache: Cache) -> TritonPages:
    """
    Raises:
        TypeError: another backend made the cache.
    """
    store = cache.pool.store
    if not isinstance(store, TritonPages):
        raise TypeError(f"a cache of {type(store).__name__} was made by another backend")
    return store


class DeviceTables:
    """A cache's block tables on the device.

    Attributes:
        values: int32 (B, pages of the capacity); the same tensor from one pass to the next as long as its shape stays.
    """

    def __init__(self, tables: NDArray[np.int32], device: torch.device) -> None:
        self._tables = tables
        self.values = torch.from_numpy(np.maximum(tables, 0)).to(device)

    def update(self, tables: NDArray[np.int32]) -> torch.Tensor:
        """`values` as these tables (`Cache.tables`) are."""
        if tables is not self._tables:
            new = torch.from_numpy(np.maximum(tables, 0))
            if new.shape == self.values.shape:
                self.values.copy_(new)
            else:
                self.values = new.to(self.values.device)
            self._tables = tables
        return self.values


def slots(tables: NDArray[np.int32], rows: NDArray[np.int32], positions: NDArray[np.int32]) -> NDArray[np.int64]:
    """Where tokens lie: page * 64 + place within it, for tokens of these rows at these positions, (N,) each."""
    return tables[rows, positions // PAGE].astype(np.int64) * PAGE + positions % PAGE
