"""One decoder for every family: embed, then layers of attention and MLP on a residual stream, then logits.

The code names operations of a backend, never a device or a number format.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kbit.errors import UsageError
from kbit.models.rope import rope_tables
from kbit.models.spec import ModelSpec
from kbit.ops.backend import Backend, Weight
from kbit.ops.kv_cache import KVCache
from kbit.ops.step import Step, plan_step, positions_of


@dataclass(frozen=True, eq=False)
class Linear:
    """A prepared matrix and its bias."""

    weight: Weight
    bias: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class Layer:
    """The weights of one block."""

    attention_norm: torch.Tensor
    qkv: tuple[Linear, Linear, Linear]
    output: Linear
    mlp_norm: torch.Tensor
    gate_up: tuple[Linear, Linear]
    down: Linear


@dataclass(frozen=True, eq=False)
class DecoderWeights:
    """All weights, prepared by one backend. A tied head is the embedding object itself, held once."""

    embedding: Weight
    layers: tuple[Layer, ...]
    final_norm: torch.Tensor
    head: Weight

    @property
    def nbytes(self) -> int:
        """Bytes in memory, a tied head counted once."""
        linears = [linear for layer in self.layers for linear in (*layer.qkv, layer.output, *layer.gate_up, layer.down)]
        vectors = [self.final_norm, *(norm for layer in self.layers for norm in (layer.attention_norm, layer.mlp_norm))]
        vectors += [linear.bias for linear in linears if linear.bias is not None]
        matrices = {id(weight): weight for weight in (self.embedding, self.head, *(x.weight for x in linears))}
        return sum(x.nbytes for x in matrices.values()) + sum(x.numel() * x.element_size() for x in vectors)


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

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for `batch` sequences of at most `capacity` tokens each."""
        spec = self.spec
        return self.backend.new_cache(spec.layers, batch, spec.kv_heads, spec.head_dim, capacity)

    def forward(
        self, ids: torch.Tensor, cache: KVCache, lengths: torch.Tensor | None = None, last_only: bool = False
    ) -> torch.Tensor:
        """Feed tokens and get the logits of what follows each.

        Args:
            ids: int64 (B, T). A right-padded ragged batch: row b has lengths[b] real tokens, the rest may be any valid
                id. Positions continue from cache.lengths[b].
            cache: of this decoder's making; takes the real tokens in, and cache.lengths grows by `lengths`.
            lengths: int64 (B,), each 0 to T; None means T for all.
            last_only: only the logits of each row's last real token.

        Returns:
            float32 (B, T, V), or (B, 1, V) with last_only. Values at padding are finite and mean nothing, as does the
            last token of a row of length 0.

        Raises:
            UsageError: shapes that do not fit, an id outside the vocabulary, or a full cache; the cache is unchanged.
        """
        lengths = self._checked(ids, cache, lengths)
        x = self._run(ids, cache, lengths)
        if last_only:
            last = (lengths.to(x.device) - 1).clamp(min=0)
            x = x[torch.arange(x.shape[0], device=x.device), last][:, None]
        return self.logits(x)

    def hidden_states(self, ids: torch.Tensor, cache: KVCache, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """`forward` without the head: (B, T, hidden_size) before the final norm, in the backend's type.

        With `logits` on slices of the result, a caller bounds the memory of (B, T, V).
        """
        return self._run(ids, cache, self._checked(ids, cache, lengths))

    @torch.no_grad()
    def _run(self, ids: torch.Tensor, cache: KVCache, lengths: torch.Tensor) -> torch.Tensor:
        """All layers, and the cache's new lengths: ids (B, T), lengths (B,) -> (B, T, hidden_size)."""
        backend, spec = self.backend, self.spec
        step = self._plan(cache, lengths, ids.shape[1])
        x = backend.embed(self.weights.embedding, ids.to(backend.device))  # (B, T, hidden)
        for index, layer in enumerate(self.weights.layers):
            x = x + self._attention(layer, backend.norm(x, layer.attention_norm, spec.norm_eps), step, cache, index)
            x = x + self._mlp(layer, backend.norm(x, layer.mlp_norm, spec.norm_eps))
        cache.advance(step.lengths)
        return x

    @torch.no_grad()
    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Final norm and head: hidden states (..., hidden_size) -> float32 (..., V)."""
        return self.backend.logits(self.weights.head, self.backend.norm(x, self.weights.final_norm, self.spec.norm_eps))

    def _attention(self, layer: Layer, x: torch.Tensor, step: Step, cache: KVCache, index: int) -> torch.Tensor:
        """x (B, T, hidden), normed -> (B, T, hidden)."""
        backend, spec = self.backend, self.spec
        q, k, v = (_heads(part, spec.head_dim) for part in self._linears(layer.qkv, x))  # (B, T, H or H_kv, D)
        q = backend.rope_and_append(q, k, v, step, cache, index)
        seen = backend.attend(q, step, cache, index, spec.attention_scale, spec.windows[index])
        return backend.linear(layer.output.weight, seen.flatten(-2), layer.output.bias)

    def _mlp(self, layer: Layer, x: torch.Tensor) -> torch.Tensor:
        """x (B, T, hidden), normed -> (B, T, hidden)."""
        gate, up = self._linears(layer.gate_up, x)
        return self.backend.linear(
            layer.down.weight, self.backend.activate(gate, up, self.spec.activation), layer.down.bias
        )

    def _linears(self, linears: Sequence[Linear], x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.backend.linear_group([linear.weight for linear in linears], x, [linear.bias for linear in linears])

    def _plan(self, cache: KVCache, lengths: torch.Tensor, width: int) -> Step:
        lengths = lengths.to(cache.lengths.device)
        positions = positions_of(cache.lengths, width)
        cos, sin = rope_tables(self.spec.rope, positions, cache.lengths + lengths)
        return plan_step(cache.lengths, lengths, cos, sin)

    def _checked(self, ids: torch.Tensor, cache: KVCache, lengths: torch.Tensor | None) -> torch.Tensor:
        """Refuse a request that cannot be met, before anything is computed; the lengths, filled in."""
        if ids.ndim != 2 or ids.shape[1] == 0 or ids.dtype != torch.int64:
            raise UsageError(f"token ids must be int64 (rows, tokens) with at least 1 token, not {_kind(ids)}")
        if ids.shape[0] != cache.batch:
            raise UsageError(f"{ids.shape[0]} rows of token ids do not fit a cache of {cache.batch} rows")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.spec.vocab_size:
            bad = low if low < 0 else high
            raise UsageError(f"token id {bad} is outside the model's vocabulary of {self.spec.vocab_size}")
        if lengths is None:
            lengths = torch.full((ids.shape[0],), ids.shape[1], dtype=torch.int64)
        elif lengths.shape != ids.shape[:1] or lengths.dtype != torch.int64:
            raise UsageError(f"lengths must be int64 ({ids.shape[0]},), not {_kind(lengths)}")
        elif int(lengths.min()) < 0 or int(lengths.max()) > ids.shape[1]:
            raise UsageError(f"lengths {lengths.tolist()} do not fit {ids.shape[1]} tokens per row")
        cache.reserve(lengths.to(cache.lengths.device))
        return lengths


def _heads(x: torch.Tensor, head_dim: int) -> torch.Tensor:
    """(B, T, H D) -> (B, T, H, D)."""
    return x.view(*x.shape[:-1], -1, head_dim)


def _kind(x: torch.Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"
