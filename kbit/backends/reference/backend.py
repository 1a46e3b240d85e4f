"""ReferenceBackend: every operation exactly as kernels/reference.py defines it, on the CPU, in float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kbit.backends.reference.kv_cache import KVCache
from kbit.backends.step import Step, plan_step, positions_of
from kbit.formats.quant_tensor import QuantTensor
from kbit.graph.cache import Cache
from kbit.graph.ops import Attention, Definition, Group, Vector, Weight
from kbit.kernels import reference


@dataclass(frozen=True, eq=False)
class ReferenceWeight(Weight):
    """A float32 matrix, or a quantized one that is dequantized at every use."""

    data: torch.Tensor | QuantTensor

    @property
    def shape(self) -> tuple[int, int]:
        return (self.data.shape[0], self.data.shape[1])

    @property
    def nbytes(self) -> int:
        if isinstance(self.data, QuantTensor):
            return self.data.nbytes
        return self.data.numel() * self.data.element_size()


class RowOps:
    """The operations that take every token by itself, on tensors (..., K).

    Args:
        group: the processes that share the model, if several do.
    """

    def __init__(self, group: Group | None = None) -> None:
        self._group = group

    def embed(self, weight: Weight, ids: torch.Tensor) -> torch.Tensor:
        return reference.embed(_data(weight), ids)

    def linear(
        self,
        weight: Weight,
        x: torch.Tensor,
        bias: Vector | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        added = None if bias is None else tensor_of(bias)
        if residual is None or self._group is None:
            out = reference.linear(x, _data(weight), added)
            return out if residual is None else residual + out
        out = self._group.sum(reference.linear(x, _data(weight), None))
        return residual + (out if added is None else out + added)

    def linear_group(
        self, weights: Sequence[Weight], x: torch.Tensor, biases: Sequence[Vector | None]
    ) -> tuple[torch.Tensor, ...]:
        return tuple(self.linear(weight, x, bias) for weight, bias in zip(weights, biases, strict=True))

    def norm(self, x: torch.Tensor, weight: Vector, eps: float) -> torch.Tensor:
        return reference.rms_norm(x, tensor_of(weight), eps)

    def activate(self, gate: torch.Tensor, up: torch.Tensor | None, kind: str) -> torch.Tensor:
        return reference.activate(gate, up, kind)

    def logits(self, weight: Weight, x: torch.Tensor) -> torch.Tensor:
        out = reference.logits(x, _data(weight))
        return out if self._group is None else self._group.from_first(out)

    def self_attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attention: Attention) -> torch.Tensor:
        raise TypeError("attention needs a step and a cache: this is a pass without tokens (a head)")


class StepOps(RowOps):
    """All operations, for one step's tokens: values are (B, T, K).

    Args:
        step: positions, lengths, cosines and sines.
        cache: where keys and values go; the caller has reserved room.
        group: see RowOps.
    """

    def __init__(self, step: Step, cache: KVCache, group: Group | None = None) -> None:
        super().__init__(group)
        self._step = step
        self._cache = cache

    def self_attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attention: Attention) -> torch.Tensor:
        step, cache, layer = self._step, self._cache, attention.layer
        q, k, v = (x.view(*x.shape[:-1], -1, attention.head_dim) for x in (q, k, v))  # (B, T, H or H_kv, D)
        cache.append(layer, reference.rope(k, step.cos, step.sin), v, step)
        seen = reference.attend(
            reference.rope(q, step.cos, step.sin),
            cache.keys[layer],
            cache.values[layer],
            step.positions,
            step.kv_lengths,
            attention.scale,
            attention.window,
        )
        return seen.flatten(-2)


class ReferenceRunner:
    """Runs a definition by calling it (a `kbit.graph.ops.Runner`)."""

    def __init__(self, definition: Definition, group: Group | None = None) -> None:
        self._definition = definition
        self._group = group

    @torch.no_grad()
    def hidden(self, ids: torch.Tensor, cache: Cache, lengths: Sequence[int]) -> torch.Tensor:
        if not isinstance(cache, KVCache):
            raise TypeError(f"a {type(cache).__name__} was made by another backend")
        device = cache.lengths.device
        new = torch.tensor(lengths, dtype=torch.int64, device=device)
        positions = positions_of(cache.lengths, ids.shape[1])
        tables = self._definition.rotation(positions.cpu().numpy(), (cache.lengths + new).cpu().numpy())
        cos, sin = (torch.from_numpy(table).to(device) for table in tables)
        ops = StepOps(plan_step(cache.lengths, new, cos, sin), cache, self._group)
        x = self._definition.body(ops, ids.to(device))
        cache.advance(new)
        return x

    @torch.no_grad()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._definition.head(RowOps(self._group), hidden)

    def forward(self, ids: torch.Tensor, cache: Cache, lengths: Sequence[int], last_only: bool) -> torch.Tensor:
        x = self.hidden(ids, cache, lengths)
        if last_only:
            last = torch.tensor([max(length - 1, 0) for length in lengths], device=x.device)
            x = x[torch.arange(x.shape[0], device=x.device), last][:, None]
        return self.logits(x)

    def extend(self, ids: Sequence[int], cache: Cache, last_only: bool) -> NDArray[np.float32]:
        tokens = torch.tensor([ids], dtype=torch.int64)  # (1, T)
        rows: NDArray[np.float32] = self.forward(tokens, cache, [len(ids)], last_only)[0].numpy()
        return rows


class ReferenceBackend:
    """Runs any model anywhere torch runs; the yardstick for every other backend.

    Args:
        expand: dequantize quantized weights once, when they are prepared: fast, but 4 bytes a weight. False keeps them
            packed and dequantizes at every use: lean, and slow, since every token pays for it.
        group: the processes that share a model, if several do (`kbit.graph.ops.SplitBackend`).
    """

    name = "reference"

    def __init__(self, *, expand: bool = True, group: Group | None = None) -> None:
        self.expand = expand
        self.group = group
        self.device = torch.device("cpu")

    def describe(self) -> str:
        held = "expanded" if self.expand else "kept packed"
        shared = "" if self.group is None else f", {self.group.size} processes"
        return f"reference: torch on CPU, {torch.get_num_threads()} threads, fp32, quantized weights {held}{shared}"

    def split(self, group: Group) -> ReferenceBackend:
        return ReferenceBackend(expand=self.expand, group=group)

    def prepare(self, weight: torch.Tensor | QuantTensor, *, lookup: bool = False) -> ReferenceWeight:
        if isinstance(weight, QuantTensor):
            return ReferenceWeight(weight.dequantize() if self.expand else weight)
        return ReferenceWeight(weight.to(self.device, torch.float32).contiguous())

    def prepare_vector(self, vector: torch.Tensor) -> torch.Tensor:
        return vector.to(self.device, torch.float32).contiguous()

    def new_cache(self, layers: int, batch: int, kv_heads: int, head_dim: int, capacity: int) -> KVCache:
        return KVCache(layers, batch, kv_heads, head_dim, capacity, device=self.device)

    def bind(self, definition: Definition) -> ReferenceRunner:
        return ReferenceRunner(definition, self.group)


def _data(weight: Weight) -> torch.Tensor | QuantTensor:
    if not isinstance(weight, ReferenceWeight):
        raise TypeError(f"{type(weight).__name__} was prepared by another backend")
    return weight.data


def tensor_of(vector: Vector) -> torch.Tensor:
    """A vector that this backend prepared."""
    if not isinstance(vector, torch.Tensor):
        raise TypeError(f"{type(vector).__name__} was prepared by another backend")
    return vector
