"""Rectangles of tokens: right-padded batches in torch, for callers that think in them. Models run ragged ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from kbit.graph.backend import Array
from kbit.graph.batch import Batch
from kbit.graph.cache import Cache
from kbit.host.errors import UsageError


def pack(ids: torch.Tensor, cache: Cache, lengths: torch.Tensor | None, last_only: bool) -> Batch:
    """The real tokens of a right-padded batch.

    Args:
        ids: int64 (B, T).
        cache: the B sequences they go on with.
        lengths: int64 (B,), real tokens of each row, 0 to T; None means T for all.
        last_only: only the last real token of each row is wanted, not all.

    Raises:
        UsageError: shapes that do not fit.
    """
    if ids.ndim != 2 or ids.shape[1] == 0 or ids.dtype != torch.int64:
        raise UsageError(f"token ids must be int64 (rows, tokens) with at least 1 token, not {_kind(ids)}")
    rows, width = ids.shape
    if rows != cache.batch:
        raise UsageError(f"{rows} rows of token ids do not fit a cache of {cache.batch} rows")
    wanted: Literal["last", "all"] = "last" if last_only else "all"
    array = ids.cpu().numpy()
    if lengths is None:
        return Batch.packed(array.reshape(-1), [width] * rows, cache.lengths, wanted)
    if lengths.shape != ids.shape[:1] or lengths.dtype != torch.int64:
        raise UsageError(f"lengths must be int64 ({rows},), not {_kind(lengths)}")
    counts = lengths.tolist()
    if min(counts) < 0 or max(counts) > width:
        raise UsageError(f"lengths {counts} do not fit {width} tokens per row")
    packed = np.concatenate([row[:count] for row, count in zip(array, counts, strict=True)])
    return Batch.packed(packed, counts, cache.lengths, wanted)


def pad(rows: Array, counts: Sequence[int], width: int) -> torch.Tensor:
    """Results of real tokens (L, N), counts[b] of row b, as a right-padded batch (B, width, N), zero at padding."""
    values = torch.as_tensor(rows)
    if len(values) == width * len(counts):
        return values.view(len(counts), width, -1)
    out = values.new_zeros((len(counts), width, values.shape[1]))
    for row, part in zip(out, torch.split(values, list(counts)), strict=True):
        row[: len(part)] = part
    return out


def _kind(x: torch.Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"
