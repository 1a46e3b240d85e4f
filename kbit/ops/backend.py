"""Backend: the few operations a model is made of, and who runs them.

Models call a backend and nothing else, so a new device means a new backend and no change to a model. Operations are cut
where fused kernels exist: rotating, and writing to the cache, is one call; attention reads the cache itself; weights
that share an input are multiplied in one call.

Dimension names: B batch rows, T new tokens per row, H query heads, H_kv key/value heads, D head dimension, K input
features, N output features, V vocabulary. Activations are in whatever float type the backend computes in; only logits
are promised to be float32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import torch

from kbit.formats.quant_tensor import QuantTensor
from kbit.ops.kv_cache import KVCache
from kbit.ops.step import Step


class Weight(ABC):
    """A matrix as one backend keeps it. Only the backend that prepared it can look inside."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(N, K)."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes it occupies in memory."""


class Backend(Protocol):
    """What a device must be able to do to run a model."""

    @property
    def name(self) -> str:
        """A short name for reports, for example "reference"."""

    @property
    def device(self) -> torch.device:
        """Where token ids, lengths and activations live."""

    def describe(self) -> str:
        """One line for people: what computes, in which types, and how weights are held."""

    def prepare(self, weight: torch.Tensor | QuantTensor, *, lookup: bool = False) -> Weight:
        """Take over a matrix (N, K), rearranging it once if that helps. The argument may be kept: do not change it.

        Args:
            weight: float, or quantized.
            lookup: its rows will also be looked up with `embed` (an embedding, perhaps tied to the head).

        Raises:
            UnsupportedError: a format this backend does not run.
        """

    def prepare_vector(self, vector: torch.Tensor) -> torch.Tensor:
        """A norm's weight or a bias (N,), in this backend's type and on its device."""

    def new_cache(self, layers: int, batch: int, kv_heads: int, head_dim: int, capacity: int) -> KVCache:
        """An empty cache with room for `capacity` tokens per row."""

    def embed(self, weight: Weight, ids: torch.Tensor) -> torch.Tensor:
        """Rows of a weight prepared with lookup=True: ids int64 (B, T), each in [0, V) -> (B, T, K)."""

    def linear(self, weight: Weight, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x W^T + b: x (..., K) -> (..., N)."""

    def linear_group(
        self, weights: Sequence[Weight], x: torch.Tensor, biases: Sequence[torch.Tensor | None]
    ) -> tuple[torch.Tensor, ...]:
        """Several linears of one input (q, k, v; gate, up), which a backend may fuse: x (..., K) -> (..., N_i) each."""

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """RMS normalisation over the last dimension: x (..., K), weight (K,) -> (..., K)."""

    def rope_and_append(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step, cache: KVCache, layer: int
    ) -> torch.Tensor:
        """Rotate q and k to their positions and write the real tokens' k and v into the cache.

        Args:
            q: (B, T, H, D).
            k: (B, T, H_kv, D).
            v: (B, T, H_kv, D).
            step: positions, lengths, cosines and sines.
            cache: where k and v go; the caller has reserved room.
            layer: which layer of it.

        Returns:
            The rotated q, (B, T, H, D). q and k may be overwritten.
        """

    def attend(
        self, q: torch.Tensor, step: Step, cache: KVCache, layer: int, scale: float, window: int | None
    ) -> torch.Tensor:
        """Causal attention of this step's queries over the cache, this step's tokens included.

        Args:
            q: (B, T, H, D), rotated.
            step: positions and lengths.
            cache: keys and values; slot j of a row holds position j.
            layer: which layer of it.
            scale: multiplies the dot products.
            window: tokens a query sees at most, itself included, or None.

        Returns:
            (B, T, H, D). Padding gives some finite value.
        """

    def activate(self, gate: torch.Tensor, up: torch.Tensor | None, kind: str) -> torch.Tensor:
        """act(gate) * up, or act(gate): (..., K). `kind` is one of kernels.reference.ACTIVATIONS."""

    def logits(self, weight: Weight, x: torch.Tensor) -> torch.Tensor:
        """x (..., K) against a weight (V, K) -> float32 (..., V)."""
