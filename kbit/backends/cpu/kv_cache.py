"""The native backend's caches: pages in native memory (`kbit._native.KVPages` is a `kbit.graph.pages.PageStore`)."""

from __future__ import annotations

from kbit import _native
from kbit.graph.cache import Cache
from kbit.graph.pages import PagePool, PerLayer


def new_pool(
    layers: int, kv_heads: PerLayer, head_dim: PerLayer, kind: str, pages: int, *, latent: bool = False
) -> PagePool:
    """Pages of native memory, which is taken from the system when tokens are written.

    Args:
        kv_heads, head_dim: of all layers, or of each.
        kind: what is stored: "fp32", "fp16", or bits of codes, "8", "4", "3" or "2", or
            two of these, "8,4", of keys and of values.
        pages: how many, at least 1.
        latent: keys are the values, too, and kept once.

    Raises:
        UsageError: an unknown kind, or codes where head_dim is not a multiple of 16.
        MemoryError: there is no room for them.
    """
    return PagePool(_native.KVPages(layers, kv_heads, head_dim, kind, pages, latent))


def native_pages(cache: Cache) -> _native.KVPages:
    """What programs read and write.

    Raises:
        TypeError: another backend made the cache.
    """
    store = cache.pool.store
    if not isinstance(store, _native.KVPages):
        raise TypeError(f"a cache of {type(store).__name__} was made by another backend")
    return store
