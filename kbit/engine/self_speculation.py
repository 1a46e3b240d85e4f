"""Self-speculation: the low planes of a nested model draft, and all of them check. No second model is in memory.

The draft goes into the model's own cache, behind keys and values that the full width has written, and is taken out
again before the check, which writes them anew. So a draft begins from what is exact, and what it leaves is overwritten.

What repeats the text is copied from there (kbit.engine.ngram), which costs nothing, where that has often held. Else
the width, the length and the confidence at which a draft ends are those that give the most tokens per time
(kbit.engine.draft_policy), and of a large vocabulary a draft chooses from a part alone (kbit.engine.shortlist). Where
no draft pays, none is made, but for a short one now and then that measures again.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from kbit.engine.draft_policy import CopiedRecord, Plan
from kbit.engine.draft_widths import MATCHED, PAUSE, TRY, Made, best_width, check_widths, draft_widths, names_of
from kbit.engine.loader import LoadedModel
from kbit.engine.ngram import NgramDrafter
from kbit.engine.pass_costs import PassClock, rows_cost
from kbit.engine.prompt_cache import PromptCache
from kbit.engine.sampler import Guess, Sampler
from kbit.engine.shortlist import top_probability

# With the token before it a draft is eight rows then, which AVX-512 multiplies with weights that are decoded once.
_LONGEST = 7
# Tokens of a prompt whose like may come again.
_RECENT = 2048


@dataclass(eq=False)
class _Draft:
    """A draft that is not judged yet.

    Attributes:
        begin: where in the text it begins.
        tokens: of it.
        made: who made it.
    """

    begin: int
    tokens: list[int]
    made: Made


class SelfDrafter:
    """Drafts with narrower widths of the model itself (a `kbit.engine.speculative.Drafter`).

    Args:
        loaded: the model, at the width that checks.
        bits: the width that drafts; None: chosen by what is accepted.

    Raises:
        UsageError: the model is not nested, or does not serve this width.
    """

    def __init__(self, loaded: LoadedModel, bits: int | None = None) -> None:
        check_widths(loaded.name, loaded.ladder.below(loaded.bits), bits)
        self._asked = bits
        self._ngram, self._copied = NgramDrafter(), CopiedRecord()
        self.follow(loaded)

    def follow(self, loaded: LoadedModel) -> None:
        """Draft for the model at another width."""
        self._widths, self._shortlist = draft_widths(loaded, self._asked)
        self._clock = PassClock(len(self._widths))
        self._since = PAUSE  # the first text begins with a try
        self._length = 0
        self._last: _Draft | None = None
        self._cache: PromptCache | None = None
        self._rows: NDArray[np.float32] | None = None

    @property
    def name(self) -> str:
        return names_of(self._widths)

    @property
    def context(self) -> int | None:
        return None

    def attach(self, cache: PromptCache) -> None:
        """The cache of the next text."""
        self._cache = cache

    def start(self, prompt_ids: Sequence[int], *, room: int, end_ids: Collection[int], vocab_size: int) -> None:
        self._end_ids, self._last, self._rows = end_ids, None, None
        self._length = len(prompt_ids)
        self._ngram.start(prompt_ids, room=room, end_ids=end_ids, vocab_size=vocab_size)
        if self._shortlist is not None:
            self._shortlist.add(prompt_ids[-_RECENT:])

    def passed(self, logits: NDArray[np.float32], seconds: float | None) -> None:
        self._rows = logits
        if seconds is not None:
            self._clock.checked(len(logits), seconds)

    def propose(self, text: Sequence[int], most: int, sampler: Sampler) -> list[Guess]:
        """As many tokens as pay at the acceptance measured so far."""
        self._learn(text)
        # The clock has no say in sampled text, whose tokens depend on what is drafted.
        timed = sampler.params.temperature == 0
        dearness = self._clock.dearness() if timed else 1.0
        checked = [1 + dearness * (rows_cost(1 + count) - 1) for count in range(min(most, _LONGEST) + 1)]
        copied = self._ngram.find(text, MATCHED)
        copy = self._copied.plan(len(copied), checked)
        costs = [self._clock.cost(i, each.cost) if timed else each.cost for i, each in enumerate(self._widths)]
        plan, index = best_width(self._widths, costs, checked)
        if copy.length and copy.rate >= plan.rate:
            self._since = 0
            self._last = _Draft(len(text), copied[: copy.length], Made(None, match=len(copied)))
            return [(token, None) for token in self._last.tokens]
        if not plan.length:
            if not self._widths or self._since < PAUSE:
                return []
            plan = Plan(1.0, min(most, TRY), 0.0)
        if timed and not self._clock.knows_one:
            return []
        self._since = 0
        return self._draft(index, text, plan, sampler)

    def _learn(self, text: Sequence[int]) -> None:
        """What became of the last draft, and what the text has since then."""
        new = text[self._length :]
        self._since += len(new)
        self._length = len(text)
        if self._shortlist is not None:
            if self._rows is not None:
                self._shortlist.add_likely(self._rows[: len(new)])
            self._shortlist.add(new)
        self._rows = None
        last, self._last = self._last, None
        if last is None:
            return
        became = text[last.begin : last.begin + len(last.tokens)]
        held = 0
        while held < len(became) and became[held] == last.tokens[held]:
            held += 1
        last.made.record(self._copied, held, failed=held < len(became))

    def _draft(self, index: int, text: Sequence[int], plan: Plan, sampler: Sampler) -> list[Guess]:
        assert self._cache is not None, "attach() comes first"
        width = self._widths[index]
        guesses: list[Guess] = []
        self._last = last = _Draft(len(text), [], Made(width))
        self._cache.keep(draft=True)
        with self._cache.drafted_by(width.decoder) as cache:
            after = text[-1:]
            while True:
                begin = perf_counter()
                logits = cache.extend(after)
                guess = sampler.propose(logits, last.tokens)
                probability = top_probability(logits)
                self._clock.drafted(index, perf_counter() - begin)
                guesses.append(guess)
                last.tokens.append(guess[0])
                last.made.probabilities.append(probability)
                if len(guesses) == plan.length or guess[0] in self._end_ids or probability < plan.floor:
                    return guesses
                after = last.tokens[-1:]
