"""Definitions that are one attention each, whatever its mask, and the plain torch meaning of them.

The rows of the embedding are queries, keys and values side by side, and matrices of ones and zeros take them apart, which
is exact: so what a backend makes of some token ids is its attention alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kbit.graph.backend import Backend
from kbit.graph.ops import Attention, Ops, Weight, X

VOCABULARY = 97
Table = tuple[NDArray[np.float32], NDArray[np.float32]]


@dataclass(frozen=True)
class Heads:
    """H, H_kv and D."""

    heads: int
    kv_heads: int
    dim: int

    @property
    def widths(self) -> tuple[int, int, int]:
        return self.heads * self.dim, self.kv_heads * self.dim, self.kv_heads * self.dim

    def attention(self, mask: str) -> Attention:
        source = "encoder" if mask == "cross" else "self"
        return Attention(0, self.heads, self.kv_heads, self.dim, self.dim**-0.5, None, mask, source, "none")  # type: ignore[arg-type]

    def table(self, seed: int) -> torch.Tensor:
        """(VOCABULARY, (H + 2 H_kv) D)."""
        return torch.randn(VOCABULARY, sum(self.widths), generator=torch.Generator().manual_seed(seed))


class OneAttention:
    """A `kbit.graph.backend.Definition` whose hidden states are an attention's output, and which has no head.

    Args:
        part: "self", all of it; "store", an encoder's keys and values; "cross", attention to these.
    """

    rotation_depends_on_length = False

    def __init__(self, backend: Backend, heads: Heads, table: torch.Tensor, mask: str, part: str = "self") -> None:
        self.attention, self.part = heads.attention(mask), part
        self.embedding = backend.prepare(table, lookup=True)
        rows = torch.eye(sum(heads.widths)).split(heads.widths)
        self.takes: list[Weight] = [backend.prepare(part.contiguous()) for part in rows]

    def body(self, ops: Ops[X], ids: X) -> X:
        q, k, v = ops.linear_group(self.takes, ops.embed(self.embedding, ids), [None, None, None])
        if self.part == "self":
            return ops.self_attention(q, k, v, self.attention)
        if self.part == "cross":
            return ops.cross_attention(q, self.attention)
        ops.store_keys(k, v, self.attention)
        return q

    def head(self, ops: Ops[X], hidden: X) -> X:
        return hidden

    def rotation(self, positions: NDArray[np.int64], lengths: NDArray[np.int64]) -> Table:
        nothing = np.empty((*positions.shape, 0), dtype=np.float32)
        return nothing, nothing


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """softmax(Q K^T / sqrt(D) + mask) V in float64: q (T, H, D), k and v (S, H_kv, D), seen bool (T, S) -> (T, H, D)."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("thd,shd->hts", q.double(), k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hts,shd->thd", weights, v)


def seen_by(mask: str, tokens: int, prefix: int = 0) -> torch.Tensor:
    """bool (T, T): whether the token of a row sees that of a column."""
    row, column = torch.arange(tokens)[:, None], torch.arange(tokens)[None]
    if mask == "bidirectional":
        return torch.ones(tokens, tokens, dtype=torch.bool)
    return (column <= row) | (column < prefix) if mask == "prefix" else column <= row
