"""How a matrix is rounded with a calibration. Imports no torch: settings are part of a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

# Added to a factor's diagonal, in shares of its mean: the finite sample says nothing about directions it has not seen.
INPUT_DAMPING, OUTPUT_DAMPING = 0.03, 0.2
# Of the widths of a nested file, the one that counts more than others.
ANCHOR = 4
# Of coordinate descent after two-sided feedback (docs/methods.md: what they buy).
SWEEPS = 4


@dataclass(frozen=True)
class Settings:
    """What `kbit.quantizers.ldlq` does.

    Attributes:
        feedback: pass errors on to the columns that come after.
        two_sided: pass them on to the rows that come after, too.
        sweeps: of coordinate descent over the rounded matrix.
        search: try scales below the one that spans the block.
        input_damping, output_damping: see INPUT_DAMPING.
        static_scales: choose all scales for the weights as they are; else for what each block is to make good, too.
        within_tiles: of trellis codes with two-sided feedback: pass errors on within tiles, too.
        act_order: round columns in the order of falling importance, the diagonal of H_I (GPTQ's "activation order");
            scales are static then, since a block's columns are not rounded together. Nothing of it is stored.
    """

    feedback: bool = True
    two_sided: bool = True
    sweeps: int = 0
    search: bool = True
    input_damping: float = INPUT_DAMPING
    output_damping: float = OUTPUT_DAMPING
    static_scales: bool = False
    act_order: bool = False
    within_tiles: bool = False

    def __post_init__(self) -> None:
        assert self.static_scales or not self.act_order, "columns of a block are not rounded together"

    @property
    def identity(self) -> dict[str, Any]:
        """Plain values: of options that came later, those that are set, so that what was made before stays known."""
        later = ("static_scales", "act_order", "within_tiles")
        return {name: value for name, value in asdict(self).items() if value or name not in later}


@dataclass(frozen=True)
class Nesting:
    """How the widths of a nested file weigh against each other (`kbit.quantizers.nested`).

    Attributes:
        anchor: the width that counts more than others.
        emphasis: how much more.
        sweeps, most_sweeps: of coordinate descent over all widths; more than the first only while a width costs more
            than rounding to nearest at that width.
        tries, less: where one still does, all begins again with the weights that widths have then, the anchor's divided
            by `less`; so many beginnings at most.
        margin, step: a width that costs more than this share of rounding to nearest counts more in the next sweep, by
            the square of what it is over, at most by `step`.
    """

    anchor: int = ANCHOR
    emphasis: float = 8.0
    sweeps: int = 8
    most_sweeps: int = 16
    tries: int = 4
    less: float = 4.0
    margin: float = 0.98
    step: float = 1.5

    @classmethod
    def of(cls, low: int, high: int, anchor: int = ANCHOR) -> Nesting:
        """For these widths, the nearest of them to what is wanted the anchor."""
        return cls(min(max(anchor, low), high))

    def weights(self, widths: Sequence[int]) -> list[float]:
        """What a unit of each width's squared error counts. A further bit divides it by about four."""
        return [4.0 ** (width - widths[0]) * (self.emphasis if width == self.anchor else 1.0) for width in widths]

    def shares(self, costs: Mapping[int, float]) -> dict[int, float]:
        """What a unit of each width's cost counts, where costs are told in shares of these."""
        narrowest = costs[min(costs)]
        return {
            width: (self.emphasis if width == self.anchor else 1.0) * narrowest / cost for width, cost in costs.items()
        }


@dataclass(frozen=True)
class Tuning:
    """How `kbit.quantizers.in_turn` tunes.

    Attributes:
        turns: in which matrices are rounded, at most.
        steps: of Adam after each.
        batch: sequences of each.
        rate: of learning, of factors of rows and norms, falling to zero along half a cosine in every turn.
        weight_rate: of weights that are not rounded yet, in shares of their matrix's root mean square.
    """

    turns: int = 12
    steps: int = 40
    batch: int = 4
    rate: float = 1e-3
    weight_rate: float = 2.4e-3
