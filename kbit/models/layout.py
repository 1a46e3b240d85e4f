"""Layout: how a family's published tensors differ from the canonical ones that everything here works with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Layout:
    """What `kbit.models.canonical` undoes. The default changes nothing.

    Attributes:
        fused: published matrices that hold several, by name (with {layer}, without .weight): the slots of those, in the
            order of their rows.
        by_head: of these, each head's rows of one slot after the other, not all rows of one slot.
        transposed: matrices inside of layers are published as (inputs, outputs).
        interleaved: pairs of features that turn together lie side by side (2 i, 2 i + 1), not half of what turns apart.
        norm_offset: is added to the stored weight of every norm.
        prefix: what published names may begin with where the family's do not, or the other way round.
        renamed: parts of published names, and what the family's have instead, which may be there, too.
        unused: patterns (of `re`) of tensors that are published with some models, and that nothing here reads.
    """

    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    by_head: bool = False
    transposed: bool = False
    interleaved: bool = False
    norm_offset: float = 0.0
    prefix: str = ""
    renamed: tuple[tuple[str, str], ...] = ()
    unused: tuple[str, ...] = ()

    @property
    def changes(self) -> bool:
        """Whether published tensors differ from canonical ones in more than their names, which tell by themselves."""
        return bool(self.fused) or self.transposed or self.interleaved or self.norm_offset != 0.0
