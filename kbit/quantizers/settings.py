"""How a matrix is rounded with a calibration. Imports no torch: settings are part of a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
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
        mixed: matrices have widths of their own (`kbit.quantizers.nested_order`): what each of their widths counts then
            takes the place of `emphasis`, and no width of a single matrix is held to what rounding to nearest costs.
        ends, between: at mixed widths, what the narrowest and the widest rung count, which have nothing to mix, and
            those between whole numbers of bits; other whole numbers count 1, the anchor `emphasis`.
        by_width: of one matrix, what its widths count, narrowest first; (): all the same but for the anchor.
    """

    anchor: int = ANCHOR
    emphasis: float = 8.0
    sweeps: int = 8
    most_sweeps: int = 16
    tries: int = 4
    less: float = 4.0
    margin: float = 0.98
    step: float = 1.5
    mixed: bool = False
    ends: float = 3.0
    between: float = 0.1
    by_width: tuple[float, ...] = ()

    @classmethod
    def of(cls, low: int, high: int, anchor: int = ANCHOR, *, mixed: bool = False) -> Nesting:
        """For these widths, the nearest of them to what is wanted the anchor."""
        return cls(min(max(anchor, low), high), mixed=mixed and low < high)

    @classmethod
    def to_weigh(cls) -> Nesting:
        """For telling costs of widths: all count the same, and a few sweeps say what more would."""
        return cls(emphasis=1.0, sweeps=2, most_sweeps=2, tries=1, step=1.0)

    @property
    def identity(self) -> dict[str, Any]:
        """Plain values: of options that came later, those that are set, so that what was made before stays known."""
        found = asdict(self)
        del found["by_width"]  # of a matrix, and part of the plan
        return found if self.mixed else {key: found[key] for key in found if key not in ("mixed", "ends", "between")}

    def of_matrix(self, by_width: tuple[float, ...]) -> Nesting:
        """The same for a matrix whose widths count so much."""
        return replace(self, by_width=by_width, most_sweeps=self.sweeps, tries=1, step=1.0)

    def rung(self, bits: float, widths: Sequence[int]) -> float:
        """What a rung of so many bits counts at mixed widths.

        Args:
            bits: of it.
            widths: all there are, ascending.
        """
        if bits == self.anchor:
            return self.emphasis
        if bits in (widths[0], widths[-1]):
            return self.ends
        return 1.0 if bits == int(bits) else self.between

    def weights(self, widths: Sequence[int]) -> list[float]:
        """What a unit of each width's squared error counts. A further bit divides it by about four."""
        counts = self._counts(widths)
        return [4.0 ** (width - widths[0]) * counts[width] for width in widths]

    def shares(self, costs: Mapping[int, float]) -> dict[int, float]:
        """What a unit of each width's cost counts, where costs are told in shares of these."""
        narrowest, counts = costs[min(costs)], self._counts(sorted(costs))
        return {width: counts[width] * narrowest / cost for width, cost in costs.items()}

    def _counts(self, widths: Sequence[int]) -> dict[int, float]:
        if self.by_width:
            return dict(zip(widths, self.by_width, strict=True))
        return {width: self.emphasis if width == self.anchor else 1.0 for width in widths}


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
