"""All operations, of the tokens of one batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from kbit.backends.reference.kv_cache import ReferencePages, reference_pages
from kbit.backends.reference.row_ops import RowOps
from kbit.backends.reference.weight import dequantized, matrix_of, tensor_of
from kbit.graph.backend import Group
from kbit.graph.batch import Batch, given_features
from kbit.graph.cache import Cache, encoder_lengths
from kbit.graph.ops import Attention, LowRank, Place, Vector, Weight, check_source
from kbit.graph.pages import PAGE
from kbit.graph.states import Recurrence, ShortConvolution, States, StateSpace, StateStore
from kbit.kernels import reference
from kbit.kernels import reference_recurrent as recurrent


class StepOps(RowOps):
    """All operations, for the tokens of one batch: values are (R, K).

    Args:
        batch: the tokens.
        cos: float32 (R, F/2), rotary cosines of each token, F rotated features of a head.
        sin: likewise.
        cache: where keys and values go; the caller has reserved room.
        group: see RowOps.
    """

    def __init__(
        self, batch: Batch, cos: torch.Tensor, sin: torch.Tensor, cache: Cache, group: Group | None = None
    ) -> None:
        super().__init__(group)
        self._batch, self._cache = batch, cache
        self._cos, self._sin = cos[None], sin[None]
        self._tables = [row.pages for row in cache.rows]
        self._pages = reference_pages(cache)
        positions = batch.positions.astype(np.int64)
        pages = cache.tables[batch.sequences, positions // PAGE].astype(np.int64)
        self._slots = torch.from_numpy(pages * PAGE + positions % PAGE)
        self._positions = torch.from_numpy(positions)

    def adapt(
        self, x: torch.Tensor, products: Sequence[torch.Tensor], factors: Sequence[Sequence[LowRank | None]]
    ) -> tuple[torch.Tensor, ...]:
        adapters = self._batch.row_adapters
        if adapters is None:
            return tuple(products)
        of_rows = torch.from_numpy(adapters)
        return tuple(
            reference.add_low_rank(
                product,
                x,
                [None if f is None else (dequantized(f.down), dequantized(f.up), f.scale) for f in of_adapters],
                of_rows,
            )
            for product, of_adapters in zip(products, factors, strict=True)
        )

    def self_attention(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        attention: Attention,
        key_bias: Vector | None = None,
        sinks: Vector | None = None,
        by_distance: Vector | None = None,
    ) -> torch.Tensor:
        check_source(attention, "self")
        q = self._heads(q, attention, turned=True)
        if k is not None and v is not None:
            k, v = self._heads(k, attention, turned=True), self._heads(v, attention, turned=False)
            self._pages.append(attention.layer, self._slots, k[0], None if attention.latent else v[0])
        own = None if sinks is None else tensor_of(sinks)
        return self._attend(q, attention, self._pages, self._tables, self._batch.lengths, own, by_distance)

    def _heads(self, x: torch.Tensor, attention: Attention, *, turned: bool) -> torch.Tensor:
        """(R, H D) -> (1, R, H, D), turned to the tokens' positions where that is for attention to do."""
        x = x.view(1, len(x), -1, attention.head_dim)
        if not turned or attention.positions != "rotary":
            return x
        of = slice(*attention.angles) if attention.angles else slice(None)
        return reference.rope(x, self._cos[..., of], self._sin[..., of])

    def look_up(self, weight: Weight, of: Place, first: int = 0) -> torch.Tensor:
        return reference.embed(matrix_of(weight), first + places(self._batch, of))

    def given(self, width: int) -> torch.Tensor:
        return torch.from_numpy(given_features(self._batch, width))

    def rotate(self, x: torch.Tensor, head_dim: int, angles: tuple[int, int]) -> torch.Tensor:
        return rotated(x[None], head_dim, angles, self._cos, self._sin)[0]

    def store_keys(self, k: torch.Tensor, v: torch.Tensor, attention: Attention) -> None:
        check_source(attention, "encoder")
        k, v = (x.view(len(x), -1, attention.head_dim) for x in (k, v))
        self._pages.append(attention.layer, self._slots, k, v)

    def cross_attention(self, q: torch.Tensor, attention: Attention) -> torch.Tensor:
        check_source(attention, "encoder")
        encoder, lengths = encoder_lengths(self._cache, self._batch.counts)
        tables = [row.pages for row in encoder.rows]
        return self._attend(
            q.view(1, len(q), -1, attention.head_dim), attention, reference_pages(encoder), tables, lengths
        )

    def recur(
        self,
        x: torch.Tensor,
        decay: torch.Tensor,
        write: torch.Tensor,
        log_rates: Vector,
        recurrence: Recurrence,
    ) -> torch.Tensor:
        q, k, v = taken_apart(x, recurrence)
        rates, out = tensor_of(log_rates), torch.empty_like(v)
        for rows, before, after in self._state(recurrence.state):
            out[rows], after[...] = recurrent.gated_delta(
                q[rows], k[rows], v[rows], decay[rows], write[rows], rates, before
            )
        return out.flatten(-2)

    def scan(
        self, x: torch.Tensor, steps: torch.Tensor, log_rates: Vector, skips: Vector, space: StateSpace
    ) -> torch.Tensor:
        v, k, q = of_space(x, space)
        rates, past, out = tensor_of(log_rates), tensor_of(skips), torch.empty_like(v)
        for rows, before, after in self._state(space.state):
            out[rows], after[...] = recurrent.state_space(v[rows], k[rows], q[rows], steps[rows], rates, past, before)
        return out.flatten(-2)

    def short_convolution(
        self, x: torch.Tensor, weight: Vector, convolution: ShortConvolution, bias: Vector | None = None
    ) -> torch.Tensor:
        taps, out = tensor_of(weight).view(convolution.width, -1), torch.empty_like(x)
        for rows, before, after in self._state(convolution.state):
            out[rows], after[...] = recurrent.short_convolution(x[rows], taps, before)
        return out if bias is None else out + tensor_of(bias)

    def _state(self, index: int) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """The rows of each sequence, one of its states before them, and where that after them goes."""
        states = States.of(self._cache, StateStore)
        array = torch.from_numpy(states.store.arrays[index])
        for sequence, (before, after) in enumerate(zip(states.before.tolist(), states.after.tolist(), strict=True)):
            rows = slice(int(self._batch.bounds[sequence]), int(self._batch.bounds[sequence + 1]))
            if rows.start < rows.stop:
                yield rows, torch.zeros_like(array[0]) if before < 0 else array[before], array[after]

    def _attend(
        self,
        q: torch.Tensor,
        attention: Attention,
        pages: ReferencePages,
        tables: Sequence[Sequence[int]],
        lengths: NDArray[np.int64],
        sinks: torch.Tensor | None = None,
        by_distance: Vector | None = None,
    ) -> torch.Tensor:
        """Queries (1, R, H, D) of the batch to what their sequences have in some pages -> (R, H D).

        Args:
            tables: the pages of each sequence.
            lengths: int64 (B,), tokens there.
            sinks: see `kernels.reference.attend`.
        """
        batch, seen = self._batch, torch.empty_like(q)
        added = None if by_distance is None else tensor_of(by_distance).view(attention.heads, -1)
        prefixes = batch.prefixes if attention.mask == "prefix" else np.zeros_like(batch.prefixes)
        for index, (length, prefix) in enumerate(zip(lengths.tolist(), prefixes.tolist(), strict=True)):
            rows = slice(int(batch.bounds[index]), int(batch.bounds[index + 1]))
            if rows.start == rows.stop:
                continue
            keys, values = pages.read(attention.layer, tables[index], length)
            seen[:, rows] = reference.attend(
                q[:, rows],
                keys[None],
                values[None],
                self._positions[None, rows],
                torch.tensor([length]),
                attention.scale,
                attention.window,
                attention.mask in ("causal", "prefix"),
                prefix,
                attention.soft_cap,
                sinks,
                added,
                attention.chunked,
            )
        return seen[0].flatten(-2)


def places(batch: Batch, of: Place) -> torch.Tensor:
    """int64 (R,): positions or types of a batch's tokens."""
    if of == "positions":
        return torch.from_numpy(batch.positions.astype(np.int64))
    return torch.zeros(len(batch), dtype=torch.int64) if batch.types is None else torch.from_numpy(batch.types)


def of_space(x: torch.Tensor, space: StateSpace) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `Ops.scan` takes, as (..., H, D_v) values and (..., G, D_k) keys and queries."""
    keys = space.groups * space.key_dim
    v, k, q = torch.split(x, [space.heads * space.value_dim, keys, keys], dim=-1)
    k, q = (part.reshape(*x.shape[:-1], space.groups, space.key_dim) for part in (k, q))
    return v.reshape(*x.shape[:-1], space.heads, space.value_dim), k, q


def taken_apart(x: torch.Tensor, recurrence: Recurrence) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `Ops.recur` takes, as (..., G, D_k) queries and keys and (..., H, D_v) values."""
    keys = recurrence.key_heads * recurrence.key_dim
    q, k, v = torch.split(x, [keys, keys, recurrence.heads * recurrence.value_dim], dim=-1)
    q, k = (part.reshape(*x.shape[:-1], recurrence.key_heads, recurrence.key_dim) for part in (q, k))
    return q, k, v.reshape(*x.shape[:-1], recurrence.heads, recurrence.value_dim)


def rotated(
    x: torch.Tensor, head_dim: int, angles: tuple[int, int], cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """`Ops.rotate` of x (B, T, H D) by tables (1 or B, T, columns)."""
    of = slice(*angles)
    return reference.rope(x.view(*x.shape[:-1], -1, head_dim), cos[..., of], sin[..., of]).flatten(-2)
