"""Mixtures of experts on the Triton kernels: a layer's experts stacked, and their products grouped by expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from kbit.backends.triton.weight import TritonMatrix, triton_vector, triton_weight
from kbit.graph.operations import Mix
from kbit.graph.ops import Vector, Weight
from kbit.host.errors import UnsupportedError
from kbit.kernels import reference_experts
from kbit.kernels.triton.codecs.layout import TritonWeight
from kbit.kernels.triton.product.grouped import group_tokens, grouped_config, grouped_matmul, stack_experts
from kbit.kernels.triton.rows.activate import activate


class GroupedExperts:
    """One layer's experts. Routing and sums are torch's, on the device; nothing waits for the host.

    Args:
        operation: as recorded. Its weights become views of stacked ones, so that nothing is held twice.

    Raises:
        UnsupportedError: experts that are not quantized, or not all in one format: the kernel multiplies stacks.
    """

    def __init__(self, operation: Mix) -> None:
        experts = operation.experts
        self._mixture = operation.mixture
        try:
            self._gates, self._ups, self._downs = (
                _stacked(weights) for weights in (experts.gates, experts.ups, experts.downs)
            )
        except UnsupportedError as error:
            raise UnsupportedError(
                f"the triton backend runs experts of one quantized format alone ({error}); convert the model with one "
                "format for all experts, or use --device cpu"
            ) from None
        biases = (experts.gate_biases, experts.up_biases, experts.down_biases)
        self._gate_bias, self._up_bias, self._down_bias = (_biases(vectors) for vectors in biases)
        bias = experts.selection_bias
        self._selection_bias = None if bias is None else triton_vector(bias)
        self._scales = None if experts.scales is None else triton_vector(experts.scales)

    def __call__(self, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """x (N, K) in half precision, logits (N, E) float32 -> (N, K) float32."""
        routing, clamp = self._mixture.routing, self._mixture.clamp
        chosen, weights = reference_experts.route(
            logits,
            self._selection_bias,
            routing.chosen,
            routing.score,
            routing.normalise,
            routing.scale,
            routing.groups,
            routing.chosen_groups,
            routing.group_score,
        )
        if self._scales is not None:
            weights = weights * self._scales[chosen]
        of_entries = chosen.reshape(-1)
        tile = grouped_config(self._gates, len(of_entries), routing.experts).tokens
        groups = group_tokens(chosen, routing.experts, tile)
        plain = clamp is None and self._gate_bias is None and self._up_bias is None
        gate = grouped_matmul(x, self._gates, groups)
        if plain:
            inner = grouped_matmul(x, self._ups, groups, gate=gate, kind=self._mixture.activation)
        else:
            up = _with_bias(grouped_matmul(x, self._ups, groups), self._up_bias, of_entries)
            gate = _with_bias(gate, self._gate_bias, of_entries)
            if clamp is None:
                inner = activate(gate, up, self._mixture.activation, out_dtype=x.dtype)
            else:
                inner = reference_experts.clamped_gate(gate, up, clamp.alpha, clamp.limit).to(x.dtype)
        out = grouped_matmul(inner, self._downs, groups, torch.float32, per_entry=True)
        out = _with_bias(out, self._down_bias, of_entries)
        return (out.view(*chosen.shape, -1) * weights[..., None]).sum(dim=1)


def _stacked(weights: Sequence[Weight]) -> TritonWeight:
    """The experts' matrices one after another, of which they become views."""
    parts = [triton_weight(weight) for weight in weights]
    whole = stack_experts(parts)
    for index, (weight, part) in enumerate(zip(weights, parts, strict=True)):
        assert isinstance(weight, TritonMatrix)
        tiles = part.planes[0].shape[0]

        def view(tensor: torch.Tensor | None, own: torch.Tensor | None, at: int = index) -> torch.Tensor | None:
            return None if tensor is None or own is None else tensor[at * len(own) : (at + 1) * len(own)]

        weight.data = replace(
            part,
            planes=tuple(plane[index * tiles : (index + 1) * tiles] for plane in whole.planes),
            scales=view(whole.scales, part.scales),
            offsets=view(whole.offsets, part.offsets),
        )
    return whole


def _biases(vectors: Sequence[Vector | None]) -> torch.Tensor | None:
    """(E, N), or None where there are none."""
    present = [triton_vector(vector) for vector in vectors if vector is not None]
    return torch.stack(present) if present else None


def _with_bias(x: torch.Tensor, bias: torch.Tensor | None, experts: torch.Tensor) -> torch.Tensor:
    return x if bias is None else (x.float() + bias[experts]).to(x.dtype)
