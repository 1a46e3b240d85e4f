"""The reference's operations with gradients: what calibration and sensitivity are measured with."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import torch

from kbit.backends.reference.backend import (
    ReferenceBackend,
    ReferenceWeight,
    RowOps,
    of_space,
    rotated,
    taken_apart,
    tensor_of,
)
from kbit.backends.reference.products import product, product_with_rows
from kbit.formats.quant_tensor import QuantTensor
from kbit.graph.backend import Definition
from kbit.graph.ops import Attention, Place, Vector, Weight, refuse_attention
from kbit.graph.states import Recurrence, ShortConvolution, StateSpace
from kbit.kernels import reference
from kbit.kernels import reference_recurrent as recurrent


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

    Attributes:
        written: turned keys, and values, (B, T, H_kv, D) each, of the layers so far (`Attention.layer`): what
            attention without keys of its own attends to. Whoever runs layers one by one puts them in.
    """

    def __init__(self, definition: Definition, tokens: int) -> None:
        super().__init__()
        self.written: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
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

    def logits(self, weight: Weight, x: torch.Tensor, bias: Vector | None = None) -> torch.Tensor:
        out: torch.Tensor = _TracedLinear.apply(x, weight, self)  # type: ignore[no-untyped-call]
        return out if bias is None else out + tensor_of(bias)

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
        refuse_attention(attention, "gradient", mask=("causal", "bidirectional"), source=("self",))
        # Not kernels.reference.attend, which saves memory by writing over what a backward pass would need.
        q = self._turned(q, attention)  # (B, T, H, D)
        if k is not None and v is not None:
            self.written[attention.layer] = self._turned(k, attention), v.view(*v.shape[:-1], -1, attention.head_dim)
        k, v = self.written[attention.layer]
        values = self._repeated(v, attention)
        if sinks is None and attention.soft_cap is None:
            out = torch.nn.functional.scaled_dot_product_attention(
                q.transpose(1, 2), self._repeated(k, attention), values, self._mask(attention, by_distance),
                scale=attention.scale,
            )  # fmt: skip
        else:
            out = self.shares(q, k, attention, sinks, by_distance) @ values  # (B, H, T, D)
        return out.transpose(1, 2).flatten(-2)

    def shares(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        attention: Attention,
        sinks: Vector | None = None,
        by_distance: Vector | None = None,
    ) -> torch.Tensor:
        """What every query takes of every key's value: softmax, as `kernels.reference.attend` has it.

        Args:
            q: turned, (B, T, H, D).
            k: turned, (B, T, H_kv, D).
            attention, sinks, by_distance: of `self_attention`.

        Returns:
            (B, H, T, T); rows add up to 1, or with sinks to less.
        """
        scores = q.transpose(1, 2) @ self._repeated(k, attention).transpose(-1, -2) * attention.scale
        scores = scores if attention.soft_cap is None else reference.soft_cap(scores, attention.soft_cap)
        mask = self._mask(attention, by_distance)
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        if sinks is None:
            return torch.softmax(scores, dim=-1)
        beside = tensor_of(sinks).view(1, -1, 1, 1).expand(len(q), -1, q.shape[1], 1)
        return torch.softmax(torch.cat([scores, beside], dim=-1), dim=-1)[..., :-1]

    def _mask(self, attention: Attention, by_distance: Vector | None) -> torch.Tensor:
        """(T, T), true where a query sees a key; or (H, T, T), what is added to scores."""
        behind = self._positions[0][:, None] - self._positions  # how far back a key lies
        seen = torch.ones_like(behind, dtype=torch.bool) if attention.mask == "bidirectional" else behind >= 0
        if attention.window is not None and attention.chunked:
            at = self._positions[0]
            seen &= at[:, None] // attention.window == at // attention.window
        elif attention.window is not None:
            seen &= behind.abs() < attention.window
        if by_distance is None:
            return seen
        table = tensor_of(by_distance).view(attention.heads, -1)
        return reference.of_distances(table, -behind).masked_fill(~seen, -torch.inf)

    @staticmethod
    def _repeated(x: torch.Tensor, attention: Attention) -> torch.Tensor:
        """Keys or values (B, T, H_kv, D) for every query head: (B, H, T, D)."""
        return x.repeat_interleave(attention.heads // attention.kv_heads, 2).transpose(1, 2)

    def _turned(self, x: torch.Tensor, attention: Attention) -> torch.Tensor:
        """Heads (B, T, H, D) of (B, T, H D), turned where that is for attention to do."""
        x = x.view(*x.shape[:-1], -1, attention.head_dim)
        if attention.positions != "rotary":
            return x
        of = slice(*attention.angles) if attention.angles else slice(None)
        return reference.rope(x, self._cos[..., of], self._sin[..., of])

    def rotate(self, x: torch.Tensor, head_dim: int, angles: tuple[int, int]) -> torch.Tensor:
        return rotated(x, head_dim, angles, self._cos, self._sin)

    def recur(
        self,
        x: torch.Tensor,
        decay: torch.Tensor,
        write: torch.Tensor,
        log_rates: Vector,
        recurrence: Recurrence,
    ) -> torch.Tensor:
        q, k, v = taken_apart(x, recurrence)
        out = recurrent.gated_delta_in_chunks(q, k, v, decay, write, tensor_of(log_rates))
        return out.flatten(-2)

    def scan(
        self, x: torch.Tensor, steps: torch.Tensor, log_rates: Vector, skips: Vector, space: StateSpace
    ) -> torch.Tensor:
        parts = of_space(x, space)
        return recurrent.state_space_in_chunks(*parts, steps, tensor_of(log_rates), tensor_of(skips)).flatten(-2)

    def short_convolution(
        self, x: torch.Tensor, weight: Vector, convolution: ShortConvolution, bias: Vector | None = None
    ) -> torch.Tensor:
        taps = tensor_of(weight).view(convolution.width, -1)
        before = x.new_zeros(*x.shape[:-2], convolution.width - 1, x.shape[-1])
        out = recurrent.short_convolution(x, taps, before)[0]
        return out if bias is None else out + tensor_of(bias)

    def collect(self, weight: Weight, x: torch.Tensor, gradient: torch.Tensor) -> None:
        """Take what one product saw, once per backward pass.

        Args:
            weight: its matrix (N, K).
            x: its input (..., K).
            gradient: of its output (..., N).
        """
        raise NotImplementedError


class _TracedLinear(torch.autograd.Function):
    """x W^T whose backward pass shows the operations its input and its output's gradient.

    The graph knows the operations by a weak reference: they hold keys of earlier layers (`GradientOps.written`), which
    are part of the graph, and a ring of the two would keep every text's activations until garbage is collected.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: Weight, ops: GradientOps) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.ops = weight, weakref.ref(ops)
        return product_with_rows(x, dense(weight))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[torch.Tensor, None, None]:
        (gradient,) = grads
        (x,) = ctx.saved_tensors
        ops = ctx.ops()
        if ops is None:
            raise RuntimeError("the operations of a pass must outlive its way back")
        ops.collect(ctx.weight, x, gradient)
        return product(gradient, dense(ctx.weight)), None, None


def dense(weight: Weight) -> torch.Tensor:
    """A matrix that this backend prepared, as float32."""
    if not isinstance(weight, ReferenceWeight):
        raise TypeError(f"{type(weight).__name__} was prepared by another backend")
    return weight.data.dequantize() if isinstance(weight.data, QuantTensor) else weight.data.float()
