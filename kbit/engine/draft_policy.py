"""How much to draft, and with which width: what gives the most tokens per time, by what was measured so far.

A draft is worth its cost where its tokens hold, and the drafting model's own confidence says more of that than any
average: of 3 bits of Qwen2.5-Coder 0.5B, 98 of 100 guesses held whose probability was 0.75 or more, and 6 of 10 of
those below 0.45. So a draft goes on while its last token is likely enough, and ends with the first that is not (the
p_min of llama.cpp; here the threshold is found, not given). What a guess's probability means is counted for every width
(`WidthRecord`); with what passes cost (kbit.engine.pass_costs) that gives the tokens per cost of every threshold and
longest draft, of which the best is taken (`WidthRecord.plan`). Only the drafting model's distributions, never the
checking one's, say where a draft ends, so what is sampled keeps its distribution.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field

# A guess's probability falls into one of these classes: below the first, between two, from the last on.
EDGES = (0.3, 0.45, 0.6, 0.75, 0.9, 0.97)
_CLASSES = len(EDGES) + 1
# What is taken to have been seen of a width before its first guess: the share of each class, and the part of its
# guesses that held, at 3 bits and at 4; and how many guesses that is worth, of all classes together and of each. (About
# what the same model had of twelve texts: prose, code and chats.)
_SHARES = (0.10, 0.08, 0.08, 0.09, 0.09, 0.10, 0.46)
_HELD = ((0.45, 0.55, 0.62, 0.75, 0.92, 0.98, 0.99), (0.62, 0.72, 0.85, 0.94, 0.98, 0.99, 0.995))
_WORTH, _WORTH_EACH = 24.0, 10.0
# How fast what was seen before is forgotten, for each guess of a class and each of all.
_FADE = 0.98


@dataclass(frozen=True, order=True)
class Plan:
    """How to draft.

    Attributes:
        rate: tokens per cost of a pass without a draft, which itself has 1.
        length: most tokens; 0: none.
        floor: the draft ends with the first token of a lower probability.
    """

    rate: float
    length: int
    floor: float


NO_DRAFT = Plan(1.0, 0, 0.0)


@dataclass
class WidthRecord:
    """What is known of a width's guesses, by classes of their probability; the latest count most.

    Args:
        bits: the width.

    Attributes:
        seen: guesses of each class.
        judged, held: those of which it is known whether they held, as all before them did; those that held.
    """

    bits: InitVar[float] = 3.0
    seen: list[float] = field(init=False)
    judged: list[float] = field(init=False)
    held: list[float] = field(init=False)

    def __post_init__(self, bits: float) -> None:
        wide = min(max(bits - 3.0, 0.0), 1.0)
        self.seen = [_WORTH * share for share in _SHARES]
        self.judged = [_WORTH_EACH] * _CLASSES
        self.held = [_WORTH_EACH * ((1 - wide) * at_3 + wide * at_4) for at_3, at_4 in zip(*_HELD, strict=True)]

    def record(self, probabilities: Sequence[float], held: int, failed: bool) -> None:
        """What became of a draft.

        Args:
            probabilities: of its tokens.
            held: so many of them held,
            failed: and the next one did not; or none was left, or it was not checked.
        """
        for index, probability in enumerate(probabilities[: held + failed]):
            which = bisect_right(EDGES, probability)
            self.seen = [_FADE * count for count in self.seen]
            self.seen[which] += 1
            self.judged[which] = _FADE * self.judged[which] + 1
            self.held[which] = _FADE * self.held[which] + (index < held)

    def acceptance(self, probability: float) -> float:
        """The part of guesses of such a probability that hold where all before them did."""
        which = bisect_right(EDGES, probability)
        return self.held[which] / self.judged[which]

    def plan(self, drafted: float, checked: Sequence[float]) -> Plan:
        """The plan with the most tokens per cost.

        Args:
            drafted: cost of drafting a token, in those of a pass without a draft.
            checked: of a pass that checks so many, from none (1) on; no draft is longer than that.
        """
        total = sum(self.seen)
        parts = [count / total for count in self.seen]
        good = [part * held / judged for part, held, judged in zip(parts, self.held, self.judged, strict=True)]
        every = sum(good)
        best = NO_DRAFT
        for first in range(_CLASSES):
            # The draft goes on after a guess of the class `first` or a higher one, which is `on` of them, and holds in
            # `held` of all.
            on, held = sum(parts[first:]), sum(good[first:])
            tokens, cost, reached, all_held = 1.0, checked[0], 1.0, 1.0
            for length in range(1, len(checked)):
                # As many drafts as there are that go so far have one more token.
                tokens += all_held * every
                cost += reached * (drafted + checked[length] - checked[length - 1])
                best = max(best, Plan(tokens / cost, length, EDGES[first - 1] if first else 0.0))
                reached *= on
                all_held *= held
        return best


class CopiedRecord:
    """What is known of guesses copied from earlier in the text, by how much was the same before them."""

    _LENGTHS = (3, 5, 9)  # matches of two, of less than 5, 9; longer ones
    _HELD = (0.4, 0.5, 0.65, 0.85)
    _WORTH = 4.0

    def __init__(self) -> None:
        self._judged = [self._WORTH] * len(self._HELD)
        self._held = [self._WORTH * share for share in self._HELD]

    def record(self, match: int, held: int, failed: bool) -> None:
        """Of guesses after a match of such a length so many held, and the next one did not; or none was left."""
        which = bisect_right(self._LENGTHS, match)
        for index in range(held + failed):
            self._judged[which] = _FADE * self._judged[which] + 1
            self._held[which] = _FADE * self._held[which] + (index < held)

    def plan(self, match: int, checked: Sequence[float]) -> Plan:
        """The plan with the most tokens per cost, as `WidthRecord.plan`; what is copied costs nothing."""
        which = bisect_right(self._LENGTHS, match)
        acceptance = self._held[which] / self._judged[which]
        best, tokens, all_hold = NO_DRAFT, 1.0, 1.0
        for length in range(1, min(match, len(checked) - 1) + 1):
            all_hold *= acceptance
            tokens += all_hold
            best = max(best, Plan(tokens / checked[length], length, 0.0))
        return best
