"""What widths a nested checkpoint serves, and which width every matrix has at a number of bits.

A nested matrix can be read at any of its widths. Without an order all matrices are read at the same one, so a model
has as many rungs as widths. With an order (`Order`), every prefix of its steps is a rung: matrices have widths of their
own, each rung has all planes of those below it, and a number of bits, whole or not, takes the longest prefix whose mean
width is no more. Imports no torch: what is read of a file is decided here, before anything is.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from kbit.formats.nested import NestedFormat
from kbit.formats.registry import parse_format
from kbit.host.errors import UsageError

if TYPE_CHECKING:
    from kbit.checkpoint.source import CheckpointSource

# The key of quantization_config that has the order.
ORDER = "order"


@dataclass(frozen=True)
class Order:
    """In which order the planes of nested matrices are added, from all at the narrowest width to all at the widest.

    In a configuration it is {"matrices": [name, ..], "steps": [place, ..]}: each step is the place of a matrix among
    these, which goes on to its next width.

    Attributes:
        matrices: all nested ones, by name.
        steps: places in `matrices`.
    """

    matrices: tuple[str, ...]
    steps: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        return {"matrices": list(self.matrices), "steps": list(self.steps)}

    @classmethod
    def from_json(cls, entry: object, widths: Mapping[str, Sequence[int]]) -> Order:
        """What a configuration says.

        Args:
            entry: the value of `ORDER`.
            widths: those of every nested matrix of the model, by name.

        Raises:
            ValueError: it is no order of these matrices; the message says why.
        """
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), list) for key in ("matrices", "steps")):
            raise ValueError('it is no object of "matrices" and "steps"')
        matrices, steps = entry["matrices"], entry["steps"]
        if not all(isinstance(name, str) for name in matrices) or len(set(matrices)) < len(matrices):
            raise ValueError("a matrix is no name, or named twice")
        other = next((name for name in matrices if name not in widths), None)
        if other is not None:
            raise ValueError(f"{other[:80]} is no nested matrix")
        left = next(iter(widths.keys() - set(matrices)), None)
        if left is not None:
            raise ValueError(f"{left[:80]} is nested and not in it")
        served = {tuple(each) for each in widths.values()}
        if len(served) != 1:
            raise ValueError("its matrices serve different widths")
        bad = next((step for step in steps if type(step) is not int or not 0 <= step < len(matrices)), None)
        if bad is not None:
            raise ValueError(f"step {str(bad)[:20]} is none of {len(matrices)} matrices")
        taken = [0] * len(matrices)
        for step in steps:
            taken[step] += 1
        more = len(next(iter(served))) - 1
        wrong = next((place for place, count in enumerate(taken) if count != more), None)
        if wrong is not None:
            raise ValueError(f"{matrices[wrong][:80]} has {taken[wrong]} steps instead of {more}")
        return cls(tuple(matrices), tuple(steps))


@dataclass(frozen=True)
class Ladder:
    """The widths of a model.

    Attributes:
        widths: that all its nested matrices serve, widest first; none where there are no such matrices.
        sizes: weights of each nested matrix, by name.
        order: in which planes are added; None: those of all matrices together.
        uneven: some matrices go beyond the widest of these (--override), so that the whole file is none of the rungs.
    """

    widths: tuple[int, ...] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)
    order: Order | None = None
    uneven: bool = False

    @classmethod
    def of(cls, source: CheckpointSource) -> Ladder:
        """That of a checkpoint, which was checked when it was opened."""
        named = {name: info.stored_as for name, info in source.tensors.items() if NestedFormat.claims(info.stored_as)}
        if not named:
            return cls()
        served = [set(parse_format(text).widths) for text in set(named.values())]
        widths = tuple(sorted(set.intersection(*served), reverse=True))
        section = source.config.get("quantization_config") or {}
        entry = section.get(ORDER)
        if entry is None:
            uneven = any(max(each) > max(widths, default=0) for each in served)
            return cls(widths, {name: source.tensors[name].numel for name in named}, uneven=uneven)
        # (Of the whole model, where the source is one process's share of it.)
        shapes = {name: section["tensors"][name]["shape"] for name in named}
        order = Order(tuple(entry["matrices"]), tuple(entry["steps"]))
        return cls(widths, {name: rows * columns for name, (rows, columns) in shapes.items()}, order)

    def __bool__(self) -> bool:
        return bool(self.widths)

    def check(self, model: str, bits: float) -> None:
        """
        Args:
            model: what to call it.
            bits: that are asked for.

        Raises:
            UsageError: the model does not serve so many.
        """
        if self.sizes and not self.widths:
            raise UsageError(
                f"--bits {bits:g}: {model} has nested matrices that share no width; drop --bits, or make it again with "
                "one --nested for all"
            )
        if not self.widths:
            raise UsageError(
                f"--bits {bits:g}: {model} has one width; drop --bits, or make a model of several with kbit quantize "
                "--nested 2..8"
            )
        low, high = self.widths[-1], self.widths[0]
        if low == high != bits:
            raise UsageError(f"--bits {bits:g}: {model} serves {low} bits only; drop --bits")
        if not low <= bits <= high:
            raise UsageError(f"--bits {bits:g}: {model} serves {low} to {high} bits; choose one of these")
        if self.order is None and bits not in self.widths:
            raise UsageError(
                f"--bits {bits:g}: {model} serves whole numbers of bits, {low} to {high}; choose one of these, or make "
                f"a file that serves all between with kbit quantize --nested {low}..{high}, by a calibrated method and "
                "without --uniform"
            )

    def runs_at(self, bits: float | None) -> float | None:
        """The number of bits that a model runs at which is opened at so many, or whole (None); None where there is one
        width, or where each matrix has its widest and these differ."""
        return bits if bits is not None or self.uneven else max(self.widths, default=None)

    def below(self, bits: float | None) -> list[int]:
        """The whole numbers of bits, widest first, that are less than these; None: than all there are."""
        most = self.runs_at(bits)
        return [width for width in self.widths if most is None or width < most]

    def at(self, bits: float) -> dict[str, int]:
        """Every nested matrix's width at a number of bits that the model serves, by name."""
        if self.order is None:
            return dict.fromkeys(self.sizes, int(bits))
        found = dict.fromkeys(self.order.matrices, self.widths[-1])
        for step in self.order.steps[: self.steps_taken(bits)]:
            found[self.order.matrices[step]] += 1
        return found

    def steps_taken(self, bits: float) -> int:
        """How many steps of the order a number of bits takes."""
        return bisect_right(self._added, (bits - self.widths[-1]) * sum(self.sizes.values()) + 0.5)

    def mean(self, bits: float) -> float:
        """The mean width of a weight's code at a number of bits."""
        if self.order is None:
            return float(bits)
        taken, weights = self.steps_taken(bits), sum(self.sizes.values())
        return self.widths[-1] + (self._added[taken - 1] if taken else 0) / weights

    @cached_property
    def _added(self) -> list[int]:
        """Bits that the first steps add, one after another."""
        assert self.order is not None
        sizes = [self.sizes[name] for name in self.order.matrices]
        return list(accumulate(sizes[step] for step in self.order.steps))

    def all_steps(self, served: Mapping[str, Sequence[int]]) -> list[tuple[str, int]]:
        """(matrix, width) in the order in which a file should have their planes, beginning with the narrowest of all.

        Args:
            served: the widths of every matrix, which may be more than all have in common, by name, widest first.
        """
        steps = [(name, widths[-1]) for name, widths in served.items()]
        reached = {name: widths[-1] for name, widths in served.items()}
        if self.order is not None:
            for place in self.order.steps:
                name = self.order.matrices[place]
                reached[name] += 1
                steps.append((name, reached[name]))
            return steps
        for width in sorted({width for widths in served.values() for width in widths}):
            steps += [(name, width) for name in served if reached[name] < width <= served[name][0]]
        return steps
