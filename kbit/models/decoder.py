"""One model for every family: embed, then layers of attention and MLP on a residual stream, then logits.

`DecoderDefinition` is the model: it names operations, never a device or a number format, and every backend runs it.
`Decoder` is what a program uses: it checks requests and hands them to the backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kbit.graph.backend import Array, Backend
from kbit.graph.batch import Batch
from kbit.graph.cache import Cache
from kbit.graph.ops import Ops, Weight, X
from kbit.graph.pages import PagePool
from kbit.host.errors import UsageError
from kbit.models import blocks, per_layer
from kbit.models.blocks import Weights
from kbit.models.rope import rope_tables
from kbit.models.spec import ModelSpec

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class DecoderWeights:
    """All weights, prepared by one backend. A tied head is the embedding object itself, held once.

    Attributes:
        embedding, head: matrices (V, hidden).
        layers: the parameters of each.
        final: what else stands outside of the layers: the norm before the head, the one after the embedding, tables of
            positions and types, and what is added to scores by distance (`kbit.models.distances`).
    """

    embedding: Weight
    layers: tuple[Weights, ...]
    final: Weights
    head: Weight

    @property
    def nbytes(self) -> int:
        """Bytes in memory, a tied head counted once."""
        parts = (*self.layers, self.final)
        matrices = [self.embedding, self.head, *(matrix for part in parts for matrix in part.matrices.values())]
        vectors = [vector for part in parts for held in (part.norms, part.biases) for vector in held.values()]
        held_once = {id(matrix): matrix for matrix in matrices}.values()
        return sum(matrix.nbytes for matrix in held_once) + sum(vector.nbytes for vector in vectors)


class DecoderDefinition:
    """The model: a `kbit.graph.backend.Definition`. Values are whatever the backend's operations return."""

    def __init__(self, spec: ModelSpec, weights: DecoderWeights) -> None:
        self.spec = spec
        self.weights = weights

    def body(self, ops: Ops[X], ids: X) -> X:
        """Token ids -> hidden states (..., hidden), before the final norm; after it, where a task's head or a
        projection follows."""
        outside = self.weights.final
        x = blocks.embedding(ops, self.spec, self.weights.embedding, outside, ids)
        features = per_layer.features(ops, self.spec, outside, ids, x)
        for index, layer in enumerate(self.weights.layers):
            own = None if features is None else per_layer.of_layer(ops, self.spec, features, index)
            x = blocks.layer(ops, self.spec, layer, index, x, outside.biases.get("distances"), own)
        if self.spec.task is not None:
            return blocks.norm(ops, self.spec, outside, "final_norm", x)
        return blocks.narrowed(ops, self.spec, outside, x)

    def head(self, ops: Ops[X], hidden: X) -> X:
        """Hidden states (..., hidden) -> logits (..., V). Of an encoder: what the head made of them goes in, and where
        it has no vocabulary, they are the result."""
        if self.spec.task is not None:
            return ops.logits(self.weights.head, hidden) if self.spec.has_logits else hidden
        return blocks.head(ops, self.spec, self.weights.final, self.weights.head, hidden)

    @property
    def rotation_depends_on_length(self) -> bool:
        return any(rope.depends_on_length for rope in self.spec.ropes)

    def rotation(
        self, positions: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The tables of every rope side by side, and again, times their temperature, for queries that have one; or that
        alone, where only a part of a head turns, or those have it that do not."""
        tables = [rope_tables(rope, positions, lengths) for rope in self.spec.ropes]
        cos, sin = (np.concatenate(parts, axis=-1) for parts in zip(*tables, strict=True))
        tempered = self.spec.query_temperature or self.spec.unturned_temperature
        if tempered is None:
            return cos, sin
        beta, period = tempered
        after = 0 if self.spec.query_temperature else 1
        factor = (1.0 + beta * np.log1p((positions + after) // period)).astype(np.float32)[..., None]
        if after or self.spec.rope.dim < self.spec.head_dim:
            whole = np.broadcast_to(factor, (*cos.shape[:-1], self.spec.head_dim // 2))
            return np.concatenate([cos, whole], axis=-1), np.concatenate([sin, np.zeros_like(whole)], axis=-1)
        return np.concatenate([cos, cos * factor], axis=-1), np.concatenate([sin, sin * factor], axis=-1)


class Decoder:
    """A model ready to run. `load_decoder` makes one from a checkpoint.

    Attributes:
        spec: what it is.
        backend: who computes.
        weights: prepared by that backend.
    """

    def __init__(self, spec: ModelSpec, backend: Backend, weights: DecoderWeights) -> None:
        self.spec = spec
        self.backend = backend
        self.weights = weights
        self._runner = backend.bind(DecoderDefinition(spec, weights))

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """An empty cache for `batch` sequences of at most `capacity` tokens each."""
        spec = self.spec
        latent = spec.keeps_latents
        cache = self.backend.new_cache(spec.cache_layers, batch, *spec.cache_heads, capacity, latent=latent)
        if spec.states:
            cache.pool.states = self.backend.new_states(spec.states, 2 * batch)  # before and after a pass
        return cache

    def new_pool(self, pages: int, sequences: int = 1) -> PagePool:
        """Pages for the keys and values of this model, all free.

        Args:
            pages: how many.
            sequences: of a recurrent model, sequences whose states there is to be room for, before and after a pass.
        """
        spec = self.spec
        pool = self.backend.new_pool(spec.cache_layers, *spec.cache_heads, pages, latent=spec.keeps_latents)
        if spec.states:
            pool.states = self.backend.new_states(spec.states, 2 * sequences)
        return pool

    def run(self, batch: Batch, cache: Cache) -> Array:
        """Feeds the tokens of a batch; the logits of those that are wanted.

        Args:
            batch: the new tokens of the cache's sequences; they go on where `cache.lengths` says.
            cache: of this decoder's making; the tokens are in it afterwards.

        Returns:
            float32 (L, V), on the backend's device.

        Raises:
            UsageError: an id outside the vocabulary, or a full cache; no sequence is longer then.
            OutOfPagesError: other sequences have the pages of a shared pool.
        """
        self._reserve(batch, cache)
        if not len(batch):
            return np.empty((0, self.spec.vocab_size), dtype=np.float32)
        return self._runner.forward(batch, cache)

    def run_hidden(self, batch: Batch, cache: Cache) -> Array:
        """`run` without the head: hidden states (L, hidden_size) before the final norm, in the backend's type.

        With `run_head` on slices of the result, a caller bounds the memory of (L, V).
        """
        self._reserve(batch, cache)
        if not len(batch):
            return np.empty((0, self.spec.embedding_width), dtype=np.float32)
        return self._runner.hidden(batch, cache)

    def run_head(self, hidden: Array) -> Array:
        """Final norm and head: hidden states (L, hidden_size) -> float32 (L, V)."""
        return self._runner.logits(hidden)

    def extend(self, ids: Sequence[int], cache: Cache, last_only: bool = True) -> NDArray[np.float32]:
        """`run` for one sequence, as quick as it can be for one token: what generation calls.

        Args:
            ids: T tokens, at least 1.
            cache: of one row.
            last_only: only the logits of the last token.

        Returns:
            (1, V), or (T, V), on the CPU.

        Raises:
            UsageError, OutOfPagesError: as `run`.
        """
        if not ids or cache.batch != 1:
            raise UsageError(
                f"expected one sequence of at least 1 token, not {len(ids)} in a cache of {cache.batch} rows"
            )
        self._check_vocabulary(min(ids), max(ids))
        self._check_whole(cache)
        self._check_positions(int(cache.lengths[0]) + len(ids))
        cache.reserve((len(ids),))
        return self._runner.extend(ids, cache, last_only)

    def forward(
        self, ids: torch.Tensor, cache: Cache, lengths: torch.Tensor | None = None, last_only: bool = False
    ) -> torch.Tensor:
        """`run` for a rectangle of tokens.

        Args:
            ids: int64 (B, T). A right-padded ragged batch: row b has lengths[b] real tokens, the rest may be any id.
                Positions continue from cache.lengths[b].
            cache: of this decoder's making; takes the real tokens in, and cache.lengths grows by `lengths`.
            lengths: int64 (B,), each 0 to T; None means T for all.
            last_only: only the logits of each row's last real token.

        Returns:
            float32 (B, T, V), or (B, 1, V) with last_only. Values at padding are finite and mean nothing, as does the
            last token of a row of length 0.

        Raises:
            UsageError: shapes that do not fit, or as `run`; the cache is unchanged.
        """
        from kbit.models.padding import pack, pad

        batch = pack(ids, cache, lengths, last_only)
        logits = self.run(batch, cache)
        if last_only:
            return pad(logits, np.minimum(batch.counts, 1).tolist(), 1)
        return pad(logits, batch.counts.tolist(), ids.shape[1])

    def hidden_states(self, ids: torch.Tensor, cache: Cache, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """`forward` without the head: (B, T, hidden_size) before the final norm, in the backend's type."""
        from kbit.models.padding import pack, pad

        batch = pack(ids, cache, lengths, last_only=False)
        return pad(self.run_hidden(batch, cache), batch.counts.tolist(), ids.shape[1])

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Final norm and head: hidden states (..., hidden_size) -> float32 (..., V)."""
        import torch

        return torch.as_tensor(self.run_head(x.reshape(-1, x.shape[-1]))).view(*x.shape[:-1], -1)

    def _reserve(self, batch: Batch, cache: Cache) -> None:
        """Refuses a request that cannot be met, before anything is computed, and makes room for it."""
        if len(batch):
            self._check_vocabulary(int(batch.ids.min()), int(batch.ids.max()))
            self._check_positions(int(batch.lengths.max()))
        self._check_whole(cache)
        cache.reserve(batch.counts)

    def _check_positions(self, length: int) -> None:
        """Refuse texts that are longer than what is known of positions or distances."""
        if (self.spec.position_rows or self.spec.sloped) and length > self.spec.context_length:
            raise UsageError(
                f"a text of {length} tokens is longer than the {self.spec.context_length} positions that this "
                f"{self.spec.family} model has"
            )

    def _check_whole(self, cache: Cache) -> None:
        """Refuse to go on with a text whose earlier tokens should have seen the new ones."""
        if self.spec.mask == "bidirectional" and any(int(length) for length in cache.lengths):
            raise UsageError(
                f"every token of a {self.spec.family} model sees the whole text, which therefore cannot be continued: "
                "use an empty cache"
            )

    def _check_vocabulary(self, low: int, high: int) -> None:
        """Refuse token ids of which the smallest or the largest does not exist."""
        if low < 0 or high >= self.spec.vocab_size:
            bad = low if low < 0 else high
            raise UsageError(f"token id {bad} is outside the model's vocabulary of {self.spec.vocab_size}")
