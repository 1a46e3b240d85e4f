"""The reference's operations with gradients: what calibration and sensitivity are measured with."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from kbit.backends.reference.backend import ReferenceBackend, ReferenceWeight, RowOps, rotated, tensor_of
from kbit.backends.reference.products import product, product_with_rows
from kbit.formats.quant_tensor import QuantTensor
from kbit.graph.ops import Attention, Definition, Place, Vector, Weight, refuse_attention
from kbit.kernels import reference


class KeepingBackend(ReferenceBackend):
    """Keeps matrices in the precision they are stored in, quantized ones packed: every use makes them float32."""

    def __init__(self) -> None:
        super().__init__(expand=False)

    def prepare(self, weight: torch.Tensor | QuantTensor, *, lookup: bool = False) -> ReferenceWeight:
        return ReferenceWeight(weight if isinstance(weight, QuantTensor) else weight.contiguous())


class GradientOps(RowOps):
    """The operations for texts of T tokens from their start, values (B, T, K); `collect` sees every product.

    Args:
        definition: says how positions rotate.
        tokens: T.
    """

    def __init__(self, definition: Definition, tokens: int) -> None:
        super().__init__()
        self._positions = torch.arange(tokens)[None]  # (1, T)
        tables = definition.rotation(np.arange(tokens)[None], np.array([tokens]))
        self._cos, self._sin = (torch.from_numpy(table) for table in tables)

    def embed(self, weight: Weight, ids: torch.Tensor) -> torch.Tensor:
        return super().embed(weight, ids).requires_grad_()

    def look_up(self, weight: Weight, of: Place, first: int = 0) -> torch.Tensor:
        places = self._positions if of == "positions" else torch.zeros_like(self._positions)
        return super().embed(weight, places + first).requires_grad_()

    def linear(self, weight: Weight, x: torch.Tensor, bias: Vector | None = None) -> torch.Tensor:
        out: torch.Tensor = _TracedLinear.apply(x, weight, self)  # type: ignore[no-untyped-call]
        return out if bias is None else out + tensor_of(bias)

    def logits(self, weight: Weight, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = _TracedLinear.apply(x, weight, self)  # type: ignore[no-untyped-call]
        return out

    def self_attention(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        attention: Attention,
        key_bias: Vector | None = None,
        sinks: Vector | None = None,
        by_distance: Vector | None = None,
    ) -> torch.Tensor:
        refuse_attention(attention, "gradient", mask=("causal", "bidirectional"), source=("self",))
        # Not kernels.reference.attend, which saves memory by writing over what a backward pass would need.
        q, k, v = (x.view(*x.shape[:-1], -1, attention.head_dim) for x in (q, k, v))  # (B, T, H or H_kv, D)
        if attention.positions == "rotary":
            of = slice(*attention.angles) if attention.angles else slice(None)
            q, k = (reference.rope(x, self._cos[..., of], self._sin[..., of]) for x in (q, k))
        group = attention.heads // attention.kv_heads
        q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)))
        behind = self._positions[0][:, None] - self._positions  # (T, T): how far back a key lies
        seen = torch.ones_like(behind, dtype=torch.bool) if attention.mask == "bidirectional" else behind >= 0
        if attention.window is not None:
            seen &= behind.abs() < attention.window
        mask = seen
        if by_distance is not None:
            table = tensor_of(by_distance).view(attention.heads, -1)
            mask = reference.of_distances(table, -behind).masked_fill(~seen, -torch.inf)
        if sinks is not None:
            scores = q @ k.transpose(-1, -2) * attention.scale
            scores = scores if attention.soft_cap is None else reference.soft_cap(scores, attention.soft_cap)
            scores = scores.masked_fill(~seen, -torch.inf) if mask is seen else scores + mask
            beside = tensor_of(sinks).view(1, -1, 1, 1).expand(len(q), -1, q.shape[2], 1)
            shares = torch.softmax(torch.cat([scores, beside], dim=-1), dim=-1)
            out = shares[..., :-1] @ v
        elif attention.soft_cap is None:
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=attention.scale)  # (B, H, T, D)
        else:
            scores = reference.soft_cap(q @ k.transpose(-1, -2) * attention.scale, attention.soft_cap)
            scores = scores.masked_fill(~seen, -torch.inf) if mask is seen else scores + mask
            out = torch.softmax(scores, dim=-1) @ v
        return out.transpose(1, 2).flatten(-2)

    def rotate(self, x: torch.Tensor, head_dim: int, angles: tuple[int, int]) -> torch.Tensor:
        return rotated(x, head_dim, angles, self._cos, self._sin)

    def collect(self, weight: Weight, x: torch.Tensor, gradient: torch.Tensor) -> None:
        """Take what one product saw, once per backward pass.

        Args:
            weight: its matrix (N, K).
            x: its input (..., K).
            gradient: of its output (..., N).
        """
        raise NotImplementedError


class _TracedLinear(torch.autograd.Function):
    """x W^T whose backward pass shows the operations its input and its output's gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: Weight, ops: GradientOps) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.ops = weight, ops
        return product_with_rows(x, dense(weight))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[torch.Tensor, None, None]:
        (gradient,) = grads
        (x,) = ctx.saved_tensors
        ctx.ops.collect(ctx.weight, x, gradient)
        return product(gradient, dense(ctx.weight)), None, None


def dense(weight: Weight) -> torch.Tensor:
    """A matrix that this backend prepared, as float32."""
    if not isinstance(weight, ReferenceWeight):
        raise TypeError(f"{type(weight).__name__} was prepared by another backend")
    return weight.data.dequantize() if isinstance(weight.data, QuantTensor) else weight.data.float()
