"""Canonical tensors as their family publishes them: what `kbit.models.canonical` undoes, done again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kbit.checkpoint.source import CheckpointSource
from kbit.models.grouped_rows import grouped_rows
from kbit.models.head_order import head_order
from kbit.models.layout import Layout, Stacked
from kbit.models.parameter import Parameter
from kbit.models.params import parameters
from kbit.models.spec import ModelSpec

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Part:
    """A canonical tensor in a published one.

    Attributes:
        parameter: which.
        order: of every row of a head, which one of the published head's it is; empty where all are in their order.
        offset: what the published values lack.
    """

    parameter: Parameter
    order: tuple[int, ...] = ()
    offset: float = 0.0


@dataclass(frozen=True)
class PublishedTensor:
    """A tensor of a published checkpoint.

    Attributes:
        name, shape: there.
        parts: what its rows consist of, in order.
        heads: each head's rows of one part after the other, of so many heads; 0: all rows of a part together.
        transposed: rows are columns there.
        places: of every part int64 (N,), the row of each of its own; empty: they lie as the others say.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    heads: int = 0
    transposed: bool = False
    places: tuple[NDArray[np.int64], ...] = ()

    def order(self) -> NDArray[np.intp]:
        """Which row of its parts, put one after another, each of its rows is (each column, where it is transposed)."""
        import numpy as np

        if self.places:
            return np.argsort(np.concatenate(self.places))
        orders, first = [], 0
        for part in self.parts:
            count = part.parameter.shape[0]
            rows = np.arange(count)
            if part.order:
                rows = rows.reshape(-1, len(part.order))[:, np.argsort(part.order)].reshape(-1)
            orders.append(first + rows)
            first += count
        whole = np.concatenate(orders)
        if self.places:
            scattered = np.empty_like(whole)
            scattered[np.concatenate(self.places)] = whole
            return scattered
        if self.heads:
            return np.concatenate([rows.reshape(self.heads, -1) for rows in orders], axis=1).reshape(-1)
        return whole

    def rows(self, source: CheckpointSource, most_values: int) -> Iterator[torch.Tensor]:
        """Its values from canonical ones, float32, in runs of whole rows (or heads) of about so many values."""
        import torch

        if self.places:
            scattered = torch.empty(self.shape)
            for part, places in zip(self.parts, self.places, strict=True):
                scattered[torch.from_numpy(places)] = source.read(part.parameter.name)
            yield scattered
            return
        if self.heads or self.transposed:
            parts = [source.read(part.parameter.name) for part in self.parts]
            runs = [values.view(self.heads, -1, *values.shape[1:]) for values in parts] if self.heads else parts
            whole = torch.cat(runs, dim=1 if self.heads else 0).reshape(-1, *parts[0].shape[1:])
            yield whole.T if self.transposed else whole
            return
        if not self.shape:  # a number
            yield source.read(self.parts[0].parameter.name).reshape(1)
            return
        columns = 1 if len(self.shape) == 1 else self.shape[1]
        for part in self.parts:
            count = part.parameter.shape[0]
            step = max(1, most_values // columns)
            head = len(part.order)
            if head:
                step = max(1, step // head) * head
                canonical = torch.argsort(torch.tensor(part.order))
            for start in range(0, count, step):
                values = source.read_rows(part.parameter.name, start, min(start + step, count))
                if head:
                    values = values.view(-1, head, *values.shape[1:])[:, canonical].reshape(values.shape)
                yield values - part.offset if part.offset else values


@dataclass(frozen=True)
class StackedTensor:
    """A tensor of a published checkpoint that holds all experts of a layer.

    Attributes:
        name, shape: there.
        experts: of each, the canonical tensors whose rows it holds.
        stack: how.
    """

    name: str
    shape: tuple[int, ...]
    experts: tuple[tuple[Parameter, ...], ...]
    stack: Stacked

    def rows(self, source: CheckpointSource, most_values: int) -> Iterator[torch.Tensor]:
        """Its values from canonical ones, float32, an expert at a time."""
        import torch

        for parts in self.experts:
            values = [source.read(part.name) for part in parts]
            whole = torch.stack(values, dim=1).flatten(0, 1) if self.stack.alternating else torch.cat(values)
            yield (whole.T if self.stack.transposed and whole.dim() == 2 else whole)[None]


def _stacked(spec: ModelSpec, layout: Layout) -> dict[str, StackedTensor]:
    """The tensors of experts, by the canonical name of the first that each holds."""
    if spec.experts is None:
        return {}
    declared = {(p.layer, p.slot, p.name.rpartition(".")[2]): p for p in parameters(spec)}
    found = {}
    for layer in range(spec.layers):
        for template, stack in layout.stacked.items():
            experts = tuple(
                tuple(declared[layer, f"experts.{expert}.{slot}", stack.kind] for slot in stack.slots)
                for expert in range(spec.experts.routing.experts if spec.has_experts(layer) else 0)
            )
            if experts:
                rows, rest = sum(part.shape[0] for part in experts[0]), experts[0][0].shape[1:]
                shape = (len(experts), *((*rest, rows) if stack.transposed else (rows, *rest)))
                found[experts[0][0].name] = StackedTensor(template.format(layer=layer), shape, experts, stack)
    return found


def is_flattened(layout: Layout, parameter: Parameter) -> bool:
    """Whether a tensor is published with more axes than it has here (`Layout.flattened`)."""
    biased = parameter.role == "bias" and parameter.name.rpartition(".")[2] == "bias"
    return parameter.slot in layout.flattened and not biased


def _with_all_axes(spec: ModelSpec, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of such a tensor: a vector is a row, and a convolution of sounds has its frames last."""
    if len(shape) == 1:
        return (1, *shape)
    sound = spec.sound if spec.encoder is None else spec.encoder.sound
    assert sound is not None
    return shape[0], shape[1] // sound.taps, sound.taps


def published_tensors(spec: ModelSpec, layout: Layout) -> tuple[PublishedTensor | StackedTensor, ...]:
    """Every tensor of a model as its family publishes it, in the order of the computation. A tied head is not one."""
    together_as = [*layout.fused.items(), *((name, grouped.slots) for name, grouped in layout.grouped.items())]
    fused: dict[tuple[int | None, str], tuple[str, tuple[str, ...]]] = {
        (layer, slot): (template.format(layer=layer), slots)
        for template, slots in together_as
        for slot in slots
        for layer in range(spec.layers)
    }
    together_whole = {
        f"{template.format(layer=layer)}.{kind}"
        for template in layout.not_by_head
        for layer in range(spec.layers)
        for kind in ("weight", "bias")
    }
    by_group = {
        f"{template.format(layer=layer)}.{end}": template
        for template in layout.grouped
        for layer in range(spec.layers)
        for end in ("weight", "bias")
    }
    stacks = _stacked(spec, layout)
    inside = {part.name for stack in stacks.values() for parts in stack.experts for part in parts}
    together: dict[str, list[Part]] = {}
    for parameter in parameters(spec):
        if parameter.role == "norm" and layout.plain_norms:
            continue
        if parameter.name in inside:
            if parameter.name in stacks:
                together[parameter.name] = []
            continue
        kind = parameter.name.rpartition(".")[2]
        stored, slots = fused.get((parameter.layer, parameter.slot), (None, ()))
        if kind not in ("weight", "bias"):  # another vector of the slot's block
            stored = None
        name = parameter.name if stored is None else f"{stored}.{kind}"
        part = Part(parameter)
        if order := head_order(spec, layout, parameter.slot):
            part = Part(parameter, order)
        elif parameter.role == "norm" and layout.norm_offset and parameter.slot not in layout.whole_norms:
            part = Part(parameter, offset=layout.norm_offset)
        together.setdefault(name, []).append(part)
        together[name].sort(key=lambda part: slots.index(part.parameter.slot) if slots else 0)
    found: list[PublishedTensor | StackedTensor] = []
    for name, parts in together.items():
        if name in stacks:
            found.append(stacks[name])
            continue
        shape: tuple[int, ...] = parts[0].parameter.shape
        if shape:
            shape = (sum(part.parameter.shape[0] for part in parts), *shape[1:])
        transposed = layout.transposed and parts[0].parameter.role == "linear"
        if name in by_group:
            rows = grouped_rows(spec, layout, by_group[name])
            places = tuple(rows[part.parameter.slot] for part in parts)
            found.append(PublishedTensor(name, shape, tuple(parts), places=places))
            continue
        if is_flattened(layout, parts[0].parameter):
            found.append(PublishedTensor(name, _with_all_axes(spec, shape), tuple(parts)))
            continue
        heads = spec.heads if layout.by_head and len(parts) > 1 and name not in together_whole else 0
        found.append(PublishedTensor(name, shape[::-1] if transposed else shape, tuple(parts), heads, transposed))
    return tuple(found)
