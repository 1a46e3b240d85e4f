"""ReferenceBackend: every operation exactly as kernels/reference.py defines it, on the CPU, in float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kbit.formats.quant_tensor import QuantTensor
from kbit.kernels import reference
from kbit.ops.backend import Weight
from kbit.ops.kv_cache import KVCache
from kbit.ops.step import Step


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


class ReferenceBackend:
    """Runs any model anywhere torch runs; the yardstick for every other backend.

    Args:
        expand: dequantize quantized weights once, when they are prepared: fast, but 4 bytes a weight. False keeps them
            packed and dequantizes at every use: lean, and slow, since every token pays for it.
    """

    name = "reference"

    def __init__(self, *, expand: bool = True) -> None:
        self.expand = expand
        self.device = torch.device("cpu")

    def describe(self) -> str:
        held = "expanded to fp32 at load" if self.expand else "kept packed and dequantized at every use"
        return f"reference: torch on CPU, {torch.get_num_threads()} threads, fp32; quantized weights {held}"

    def prepare(self, weight: torch.Tensor | QuantTensor, *, lookup: bool = False) -> ReferenceWeight:
        if isinstance(weight, QuantTensor):
            return ReferenceWeight(weight.dequantize() if self.expand else weight)
        return ReferenceWeight(weight.to(self.device, torch.float32).contiguous())

    def prepare_vector(self, vector: torch.Tensor) -> torch.Tensor:
        return vector.to(self.device, torch.float32).contiguous()

    def new_cache(self, layers: int, batch: int, kv_heads: int, head_dim: int, capacity: int) -> KVCache:
        return KVCache(layers, batch, kv_heads, head_dim, capacity, device=self.device)

    def embed(self, weight: Weight, ids: torch.Tensor) -> torch.Tensor:
        return reference.embed(_data(weight), ids)

    def linear(self, weight: Weight, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return reference.linear(x, _data(weight), bias)

    def linear_group(
        self, weights: Sequence[Weight], x: torch.Tensor, biases: Sequence[torch.Tensor | None]
    ) -> tuple[torch.Tensor, ...]:
        return tuple(self.linear(weight, x, bias) for weight, bias in zip(weights, biases, strict=True))

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return reference.rms_norm(x, weight, eps)

    def rope_and_append(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step, cache: KVCache, layer: int
    ) -> torch.Tensor:
        cache.append(layer, reference.rope(k, step.cos, step.sin), v, step)
        return reference.rope(q, step.cos, step.sin)

    def attend(
        self, q: torch.Tensor, step: Step, cache: KVCache, layer: int, scale: float, window: int | None
    ) -> torch.Tensor:
        return reference.attend(
            q, cache.keys[layer], cache.values[layer], step.positions, step.kv_lengths, scale, window
        )

    def activate(self, gate: torch.Tensor, up: torch.Tensor | None, kind: str) -> torch.Tensor:
        return reference.activate(gate, up, kind)

    def logits(self, weight: Weight, x: torch.Tensor) -> torch.Tensor:
        return reference.logits(x, _data(weight))


def _data(weight: Weight) -> torch.Tensor | QuantTensor:
    if not isinstance(weight, ReferenceWeight):
        raise TypeError(f"{type(weight).__name__} was prepared by another backend")
    return weight.data
