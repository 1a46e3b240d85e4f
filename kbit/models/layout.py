"""Layout: how a family's published tensors differ from the canonical ones that everything here works with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Stacked:
    """The matrices (or biases) of all experts in one tensor, whose first axis they are on.

    Attributes:
        slots: of an expert, "gate", "up" or "down", whose rows the tensor holds.
        kind: "weight" or "bias", what it becomes.
        alternating: rows of the slots in turns, not all of one after all of the other.
        transposed: a matrix is (K, N).
    """

    slots: tuple[str, ...]
    kind: Literal["weight", "bias"] = "weight"
    alternating: bool = False
    transposed: bool = False


@dataclass(frozen=True)
class Grouped:
    """Several matrices in one, by group (`kbit.models.grouped_rows`).

    Attributes:
        slots: of these matrices, in the order of their rows within a group.
        by: what makes a group: a head of keys of a delta net, a head of keys and values, or a quarter of all heads.
    """

    slots: tuple[str, ...]
    by: Literal["key heads", "key/value heads", "quarters"]


@dataclass(frozen=True)
class Layout:
    """What `kbit.models.canonical` undoes. The default changes nothing.

    Attributes:
        fused: published matrices that hold several, by name (with {layer}, without .weight): the slots of those, in the
            order of their rows.
        by_head: of these, each head's rows of one slot after the other, not all rows of one slot.
        not_by_head: of these nevertheless all rows of one slot after the other.
        grouped: published matrices that hold several by group, by name likewise.
        flattened: slots of tensors that are published with more axes: of a matrix the last ones are its columns, of a
            vector the first has one place.
        transposed: matrices inside of layers are published as (inputs, outputs).
        interleaved: pairs of features that turn together lie side by side (2 i, 2 i + 1), not half of what turns apart.
        turned_last: what turns of a query's head comes after what does not.
        norm_offset: is added to the stored weight of every norm, but for
        whole_norms: norms, by slot, whose weights are stored as they multiply.
        plain_norms: norms have no weights there: they are 1.
        stacked: published tensors that hold all experts of a layer, by whole name (with {layer}).
        more_layers: the key of how many layers there are beyond the model's own, which predict tokens further on; they
            are left out.
        prefix: what published names may begin with where the family's do not, or the other way round.
        renamed: parts of published names, and what the family's have instead, which may be there, too.
        unused: patterns (of `re`) of tensors that are published with some models, and that nothing here reads.
    """

    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    by_head: bool = False
    not_by_head: tuple[str, ...] = ()
    grouped: Mapping[str, Grouped] = field(default_factory=dict)
    flattened: tuple[str, ...] = ()
    transposed: bool = False
    interleaved: bool = False
    turned_last: bool = False
    norm_offset: float = 0.0
    whole_norms: tuple[str, ...] = ()
    plain_norms: bool = False
    stacked: Mapping[str, Stacked] = field(default_factory=dict)
    more_layers: str | None = None
    prefix: str = ""
    renamed: tuple[tuple[str, str], ...] = ()
    unused: tuple[str, ...] = ()

    @property
    def changes(self) -> bool:
        """Whether published tensors differ from canonical ones in more than their names, which tell by themselves."""
        elsewhere = bool(self.fused) or bool(self.stacked) or self.more_layers is not None
        elsewhere = elsewhere or bool(self.grouped) or bool(self.flattened) or self.plain_norms
        return elsewhere or self.transposed or self.interleaved or self.turned_last or self.norm_offset != 0.0
