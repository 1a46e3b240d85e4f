"""Mixtures of experts on the Triton kernels: a layer's experts stacked by format, their products grouped by expert."""

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
from kbit.kernels.triton.product.grouped import (
    Groups,
    group_tokens,
    grouped_config,
    grouped_matmul,
    same_format,
    stack_experts,
)
from kbit.kernels.triton.rows.activate import activate


class GroupedExperts:
    """One layer's experts. Routing and sums are torch's, on the device; nothing waits for the host.

    Args:
        operation: as recorded. Its weights become views of stacked ones, so that nothing is held twice.

    Raises:
        UnsupportedError: experts that are not quantized: the kernel multiplies stacks of codes.
    """

    def __init__(self, operation: Mix) -> None:
        experts = operation.experts
        self._mixture = operation.mixture
        try:
            self._gates, self._ups, self._downs = (
                _Stacks(weights) for weights in (experts.gates, experts.ups, experts.downs)
            )
        except UnsupportedError as error:
            raise UnsupportedError(
                f"the triton backend runs quantized experts alone ({error}); quantize them, or use --device cpu"
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
            routing.jitter,
        )
        if self._scales is not None:
            weights = weights * self._scales[chosen]
        of_entries = chosen.reshape(-1)
        tile = grouped_config(self._gates.stacks[0], len(of_entries), routing.experts).tokens
        entries = _Entries(chosen, tile)
        scaled = routing.scales_input
        if scaled:
            x = (x[:, None] * weights[..., None]).flatten(0, 1).to(x.dtype)
        plain = clamp is None and self._gate_bias is None and self._up_bias is None
        gate = self._gates.product(x, entries, per_entry=scaled)
        if plain:
            inner = self._ups.product(x, entries, per_entry=scaled, gate=gate, kind=self._mixture.activation)
        else:
            up = _with_bias(self._ups.product(x, entries, per_entry=scaled), self._up_bias, of_entries)
            gate = _with_bias(gate, self._gate_bias, of_entries)
            if clamp is None:
                inner = activate(gate, up, self._mixture.activation, out_dtype=x.dtype)
            else:
                inner = reference_experts.clamped_gate(gate, up, clamp.alpha, clamp.limit).to(x.dtype)
        out = self._downs.product(inner, entries, torch.float32, per_entry=True)
        out = _with_bias(out, self._down_bias, of_entries)
        out = out.view(*chosen.shape, -1)
        return (out if scaled else out * weights[..., None]).sum(dim=1)


class _Stacks:
    """One matrix of every expert: those of one format together, of which they become views.

    Raises:
        UnsupportedError: a matrix that is not quantized.
    """

    def __init__(self, weights: Sequence[Weight]) -> None:
        parts = [triton_weight(weight) for weight in weights]
        alike: list[list[int]] = []
        for index, part in enumerate(parts):
            if part.dense is not None:
                raise UnsupportedError(f"expert {index} is {part.format}")
            members = next((members for members in alike if same_format(parts[members[0]], part)), None)
            if members is None:
                alike.append([index])
            else:
                members.append(index)
        self.stacks = [_stacked([weights[index] for index in members]) for members in alike]
        self._members = [tuple(members) for members in alike]
        self._places: list[torch.Tensor] = []  # of each expert in a stack, or -1
        for members in alike:
            place = torch.full((len(parts),), -1, dtype=torch.int64)
            place[members] = torch.arange(len(members))
            self._places.append(place.to(parts[0].planes[0].device))

    def product(
        self,
        x: torch.Tensor,
        entries: _Entries,
        out_dtype: torch.dtype | None = None,
        *,
        per_entry: bool = False,
        gate: torch.Tensor | None = None,
        kind: str = "",
    ) -> torch.Tensor:
        """Each entry's row of x by its expert's matrix: (T TOP, N). Every stack writes the rows of its own experts.

        Args:
            entries: which experts.
            x, out_dtype, per_entry, gate, kind: as for grouped_matmul.
        """
        shape = (entries.chosen.numel(), self.stacks[0].shape[0])
        out = torch.empty(shape, dtype=out_dtype or x.dtype, device=x.device)
        for stack, members, place in zip(self.stacks, self._members, self._places, strict=True):
            groups = entries.of(members, place)
            grouped_matmul(x, stack, groups, per_entry=per_entry, gate=gate, kind=kind, out=out)
        return out


class _Entries:
    """The tokens of a pass by expert.

    Attributes:
        chosen: experts (T, TOP).
        tile: entries of a tile.
    """

    def __init__(self, chosen: torch.Tensor, tile: int) -> None:
        self.chosen, self.tile = chosen, tile
        self._sorted: dict[tuple[int, ...], Groups] = {}

    def of(self, members: tuple[int, ...], place: torch.Tensor) -> Groups:
        """Those of some experts, whose places in their stack are given; sorted once for stacks of the same experts."""
        if members not in self._sorted:
            self._sorted[members] = group_tokens(place[self.chosen], len(members), self.tile)
        return self._sorted[members]


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
