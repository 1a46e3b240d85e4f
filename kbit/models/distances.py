"""Attention that knows positions by distance: a table of buckets, or a slope, becomes what is added to scores.

T5's relative positions (Raffel et al. 2020, arXiv:1910.10683; MPNet has them, too): half of the buckets are for keys
after the query, where a query sees any. Of a half, the first half is for distances of its own; the rest widen
logarithmically, and the last reaches from the largest distance on.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def buckets_of(distances: NDArray[np.int64], buckets: int, largest: int, *, causal: bool = False) -> NDArray[np.int64]:
    """The bucket of every distance, a key's position less its query's: same shape.

    Args:
        distances: any shape.
        buckets: how many there are.
        largest: distances from here on share a bucket.
        causal: no key comes after its query, so all buckets are for those before.
    """
    half = buckets if causal else buckets // 2
    exact, away = half // 2, np.maximum(-distances, 0) if causal else np.abs(distances)
    # In float32, as models were trained.
    ratio = np.log(np.maximum(away, 1).astype(np.float32) / np.float32(exact))
    far = exact + (ratio / np.float32(np.log(largest / exact)) * np.float32(half - exact)).astype(np.int64)
    return np.where((distances > 0) & (not causal), half, 0) + np.where(away < exact, away, np.minimum(far, half - 1))


def by_distance(table: NDArray[np.float32], largest: int, *, causal: bool = False) -> NDArray[np.float32]:
    """What `Ops.self_attention` adds to scores.

    Args:
        table: (buckets, H).
        largest: distances from here on share a bucket.
        causal: see `buckets_of`.

    Returns:
        (H (2 largest + 1),).
    """
    distances = np.arange(-largest, largest + 1)
    rows: NDArray[np.float32] = table[buckets_of(distances, len(table), largest, causal=causal)]
    return np.ascontiguousarray(rows.T).reshape(-1)


def slopes(heads: int) -> NDArray[np.float32]:
    """How fast each head's scores fall with the distance in ALiBi (Press et al. 2022, arXiv:2108.12409): (H,).

    A geometric sequence for a power of two of heads; for others that of the next lower one, and every other slope of
    the next higher one.
    """
    lower = 1 << (heads.bit_length() - 1)
    found = [2.0 ** (-8.0 * (i + 1) / lower) for i in range(lower)]
    found += [2.0 ** (-8.0 * (2 * i + 1) / (2 * lower)) for i in range(heads - lower)]
    return np.array(found, dtype=np.float32)


def by_slope(heads: int, reach: int, factor: float = 1.0) -> NDArray[np.float32]:
    """What `Ops.self_attention` adds to scores with ALiBi, for distances up to `reach`: (H (2 reach + 1),).

    Args:
        factor: on all slopes.
    """
    distances = np.arange(-reach, reach + 1, dtype=np.float32)
    found: NDArray[np.float32] = np.float32(factor) * slopes(heads)[:, None] * distances
    return found.reshape(-1)
