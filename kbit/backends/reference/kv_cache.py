"""The reference backend's caches: pages as float32 tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kbit.graph.cache import Cache
from kbit.graph.pages import PAGE, PerLayer, of_layers, pages_for


class ReferencePages:
    """Keys and values of every layer in pages (a `kbit.graph.pages.PageStore`). All memory is taken at once.

    Attributes:
        keys: per layer (P, H_kv, PAGE, D), rotated.
        values: per layer (P, H_kv, PAGE, D); of latents none, as keys are their values.
    """

    def __init__(
        self, layers: int, kv_heads: PerLayer, head_dim: PerLayer, pages: int, *, latent: bool = False
    ) -> None:
        heads = zip(of_layers(kv_heads, layers), of_layers(head_dim, layers), strict=True)
        shapes = [(pages, count, PAGE, dim) for count, dim in heads]
        self.keys = [torch.zeros(shape) for shape in shapes]
        self.values = [] if latent else [torch.zeros(shape) for shape in shapes]

    @property
    def count(self) -> int:
        """P."""
        return self.keys[0].shape[0]

    @property
    def page_bytes(self) -> int:
        """Bytes of a page, all layers."""
        return sum(part[0].numel() * part.element_size() for part in (*self.keys, *self.values))

    def resize(self, count: int) -> None:
        """Memory for `count` pages. Old and new arrays of a layer exist side by side while it is copied."""
        for part in (self.keys, self.values):
            for layer, old in enumerate(part):
                part[layer] = old.new_zeros((count, *old.shape[1:]))
                part[layer][: len(old)] = old

    def copy(self, source: int, target: int) -> None:
        """Makes page `target` the same as `source`."""
        for part in (*self.keys, *self.values):
            part[target] = part[source]

    def append(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None) -> None:
        """Writes tokens into one layer.

        Args:
            layer: index of the layer.
            slots: int64 (R,), page * PAGE + place in the page.
            k: (R, H_kv, D), rotated.
            v: (R, H_kv, D), or None: keys are values.
        """
        self.keys[layer][slots // PAGE, :, slots % PAGE] = k
        if v is not None:
            self.values[layer][slots // PAGE, :, slots % PAGE] = v

    def read(self, layer: int, table: Sequence[int], length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a sequence's first `length` tokens: (H_kv, length, D) each, a copy.

        Args:
            table: its pages.
        """
        used = torch.tensor(table[: pages_for(length)], dtype=torch.int64)
        keys, values = (
            part[layer][used].transpose(0, 1).flatten(1, 2)[:, :length]
            for part in (self.keys, self.values or self.keys)
        )
        return keys, values


def reference_pages(cache: Cache) -> ReferencePages:
    """
    Raises:
        TypeError: another backend made the cache.
    """
    store = cache.pool.store
    if not isinstance(store, ReferencePages):
        raise TypeError(f"a cache of {type(store).__name__} was made by another backend")
    return store
