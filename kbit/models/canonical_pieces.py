"""Where canonical tensors are in a published checkpoint that has them in another way (`kbit.models.layout`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from kbit.checkpoint.readers import mxfp4
from kbit.checkpoint.source import CheckpointSource
from kbit.host.errors import CheckpointError
from kbit.models.grouped_rows import grouped_rows
from kbit.models.head_order import head_order
from kbit.models.layout import Layout
from kbit.models.parameter import Parameter
from kbit.models.params import parameters
from kbit.models.published import is_flattened
from kbit.models.spec import ModelSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Piece:
    """Where a canonical tensor is.

    Attributes:
        stored: the published tensor.
        first: its first row there.
        order: of every row of a head, which one of the head's it is there; empty where all are in their order.
        offset: what is added to its values.
        expert: where it is on the first axis of a tensor of all experts; then of what is there:
        step: every so many-th row is its own.
        transposed: rows are columns there, of a whole tensor or of an expert's.
        format: in which it is packed there, if it is.
        flat: all axes but the first are columns.
        run, apart: rows that lie together there, and how far apart such runs begin; 0 where all lie together.
        places: int64 (N,), the row of each of its own; None where they lie as the others say.
    """

    stored: str
    first: int = 0
    order: tuple[int, ...] = ()
    offset: float = 0.0
    expert: int | None = None
    step: int = 1
    transposed: bool = False
    format: str | None = None
    flat: bool = False
    run: int = 0
    apart: int = 0
    places: NDArray[np.int64] | None = field(default=None, compare=False)

    @property
    def scattered(self) -> bool:
        """Whether its rows lie apart from one another, or in another order."""
        return self.places is not None or self.run > 0 or bool(self.order)

    def rows(self, start: int, stop: int) -> NDArray[np.int64]:
        """Where rows are that lie apart."""
        import numpy as np

        if self.places is not None:
            return self.places[start:stop]
        wanted = np.arange(start, stop)
        if self.order:
            within = wanted % len(self.order)
            wanted = wanted - within + np.array(self.order)[within]
        return self.first + (wanted // self.run * self.apart + wanted % self.run if self.run else wanted)


def pieces_of(source: CheckpointSource, spec: ModelSpec, layout: Layout) -> dict[str, Piece]:
    """Where every canonical tensor is that is not there as it is."""
    declared: dict[tuple[Any, ...], Parameter] = {}
    for p in parameters(spec):
        declared[p.layer, p.slot, p.name.rpartition(".")[2]] = p
    pieces = _of_stacks(source, spec, layout, declared)
    for layer in range(spec.layers):
        for template, slots in layout.fused.items():
            for end in ("weight", "bias"):
                stored = f"{template.format(layer=layer)}.{end}"
                if stored not in source.tensors:
                    continue
                parts = [declared[layer, slot, end] for slot in slots if (layer, slot, end) in declared]
                wanted_rows = sum(part.shape[0] for part in parts)
                wanted = (wanted_rows, *(parts[0].shape[1:] if parts else ()))
                turned_over = layout.transposed and end == "weight"
                wanted = wanted[::-1] if turned_over else wanted
                if source.tensors[stored].shape != wanted:
                    raise CheckpointError(
                        f"{source.path}: {stored} has shape {source.tensors[stored].shape}, but config.json asks for "
                        f"{wanted}, which are {', '.join(slots)}"
                    )
                first = 0
                by_head = layout.by_head and template not in layout.not_by_head
                for part in parts:
                    run, apart = (part.shape[0] // spec.heads, wanted_rows // spec.heads) if by_head else (0, 0)
                    pieces[part.name] = Piece(stored, first, run=run, apart=apart, transposed=turned_over)
                    first += run or part.shape[0]
    pieces |= _of_groups(source, spec, layout, declared)
    for p in declared.values():
        stored = pieces.get(p.name, Piece(p.name)).stored
        if stored not in source.tensors:
            continue  # whoever checks the tensors says so
        if is_flattened(layout, p):
            pieces[p.name] = Piece(p.name, flat=True)
        if layout.transposed and p.role == "linear" and p.name not in pieces:
            pieces[p.name] = Piece(p.name, transposed=True)
        if p.role == "norm" and layout.norm_offset and p.slot not in layout.whole_norms:
            pieces[p.name] = Piece(p.name, offset=layout.norm_offset)
        at = pieces.get(p.name, Piece(p.name))
        if at.places is None and (order := head_order(spec, layout, p.slot)):
            pieces[p.name] = replace(at, order=order)
    return pieces


def _of_stacks(
    source: CheckpointSource, spec: ModelSpec, layout: Layout, declared: Mapping[tuple[Any, ...], Parameter]
) -> dict[str, Piece]:
    """Where the tensors of experts are that are published in one for all."""
    pieces: dict[str, Piece] = {}
    for layer in range(spec.layers if spec.experts is not None else 0):
        for template, stack in layout.stacked.items():
            stored = template.format(layer=layer)
            if stored not in source.tensors:
                continue
            assert spec.experts is not None
            count, each = spec.experts.routing.experts, len(stack.slots)
            first = declared[layer, f"experts.0.{stack.slots[0]}", stack.kind].shape
            rows, rest = each * first[0], first[1:]
            packed = source.tensors[stored].stored_as == mxfp4.STORED_AS  # whose rows are rows, always
            transposed = stack.transposed and not packed
            wanted = (count, *((*rest, rows) if transposed else (rows, *rest)))
            if source.tensors[stored].shape != wanted:
                raise CheckpointError(
                    f"{source.path}: {stored} has shape {source.tensors[stored].shape}, but config.json asks for "
                    f"{wanted}, which are {' and '.join(stack.slots)} of {count} experts"
                )
            for expert in range(count):
                for at, slot in enumerate(stack.slots):
                    begin, step = (at, each) if stack.alternating else (at * first[0], 1)
                    name = declared[layer, f"experts.{expert}.{slot}", stack.kind].name
                    format = mxfp4.FORMAT if packed else None
                    pieces[name] = Piece(stored, begin, expert=expert, step=step, transposed=transposed, format=format)
    return pieces


def _of_groups(
    source: CheckpointSource, spec: ModelSpec, layout: Layout, declared: Mapping[tuple[Any, ...], Parameter]
) -> dict[str, Piece]:
    """Where the tensors are that are published by group with others."""
    pieces: dict[str, Piece] = {}
    for template, grouped in layout.grouped.items():
        places: dict[str, NDArray[np.int64]] = {}
        for layer in range(spec.layers):
            for end in ("weight", "bias"):
                stored = f"{template.format(layer=layer)}.{end}"
                parts = [declared[layer, slot, end] for slot in grouped.slots if (layer, slot, end) in declared]
                if stored not in source.tensors or not parts:
                    continue
                wanted = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
                if source.tensors[stored].shape != wanted:
                    raise CheckpointError(
                        f"{source.path}: {stored} has shape {source.tensors[stored].shape}, but config.json asks for "
                        f"{wanted}, which are {', '.join(grouped.slots)}"
                    )
                places = places or grouped_rows(spec, layout, template)
                pieces |= {part.name: Piece(stored, places=places[part.slot]) for part in parts}
    return pieces
