"""Speculation in the batch engine: guesses at the next tokens of answers, checked in the step that computes all others.

A token's random number is a function of the seed, the choice and its place. So checking a guess is choosing the token,
as without a guess, from the logits that the pass gives for its place: where that is the guess, the next place's logits
hold, too. The tokens are the very ones that there are without speculation, and it can change nothing but the speed.

Guesses come from the text itself (kbit.engine.ngram), or from it and the model's own low planes
(kbit.engine.self_speculation), which write into the pages of the text and are forgotten before the check. Nothing is
guessed where many answers are being written, or prompts are being read: then passes have rows enough, and a guess costs
what it saves.
"""

from __future__ import annotations

from collections.abc import Sequence as Sequence_
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from kbit.engine.draft_policy import CopiedRecord, Plan
from kbit.engine.draft_widths import (
    MATCHED,
    PAUSE,
    TRY,
    Made,
    Width,
    asks_for_self,
    best_width,
    check_widths,
    draft_bits,
    draft_widths,
    names_of,
)
from kbit.engine.native_sampler import NativeSampler, sample_rows
from kbit.engine.ngram import NgramDrafter
from kbit.engine.pass_costs import rows_cost
from kbit.engine.shortlist import top_probability
from kbit.engine.speculative import DRAFT_TOKENS, NGRAM
from kbit.graph.batch import Batch
from kbit.graph.cache import Cache
from kbit.graph.pages import PagePool
from kbit.host.errors import UsageError

if TYPE_CHECKING:
    from kbit.engine.loader import LoadedModel
    from kbit.engine.sequence import Sequence

# Answers that are being written at once, up to which there are guesses: beyond, a pass is bound by computing and not by
# reading weights (docs/speculation.md).
MOST_WRITING = 4
_FIRST_DRAFT = 4
# Tokens of a text whose like may come again.
_RECENT = 256


@dataclass(eq=False)
class TextDrafts:
    """What is known of one answer's guesses.

    Attributes:
        length: of the next draft at most.
        ngram: finds what followed the same words before.
        made: the last draft, where its maker has something to learn of it.
    """

    length: int = _FIRST_DRAFT
    ngram: NgramDrafter | None = None
    made: Made | None = None


@dataclass(frozen=True, eq=False)
class Asked:
    """An answer that could go on by guesses.

    Attributes:
        sequence: its text; one token of it is to be computed.
        sampler: chooses its tokens, and must not be used.
        drafts: of its.
        room: tokens that it may have after the one that the next step gives.
    """

    sequence: Sequence
    sampler: NativeSampler
    drafts: TextDrafts
    room: int


class BatchDrafter(Protocol):
    """Who guesses for several answers at once."""

    @property
    def name(self) -> str:
        """For reports."""

    def draft(self, asked: Sequence_[Asked], pool: PagePool) -> list[list[int]]:
        """Guesses at the next tokens of each, `room` at most, possibly none. The pages' books are as before."""

    def learn(self, drafts: TextDrafts, guessed: int, held: int, logits: NDArray[np.float32]) -> None:
        """Of the last draft of an answer, so many of the guesses held; logits (held + 1, V) said so."""


class NgramDrafts:
    """Guesses from what a text has said before."""

    name = NGRAM

    def draft(self, asked: Sequence_[Asked], pool: PagePool) -> list[list[int]]:
        found = []
        for each in asked:
            if each.drafts.ngram is None:
                each.drafts.ngram = NgramDrafter()
            found.append(each.drafts.ngram.find(each.sequence.ids, min(each.drafts.length, each.room)))
        return found

    def learn(self, drafts: TextDrafts, guessed: int, held: int, logits: NDArray[np.float32]) -> None:
        drafts.length = min(DRAFT_TOKENS, 2 * drafts.length if held == guessed else held + 1)


class SelfDrafts:
    """Guesses of a nested model's low planes, or copied from the text where that has held (kbit.engine.draft_policy).

    Args:
        loaded: the model, at the width that checks.
        bits: the width that drafts; None: chosen by what is accepted.

    Raises:
        UsageError: the model is not nested, or does not serve this width.
    """

    def __init__(self, loaded: LoadedModel, bits: int | None = None) -> None:
        check_widths(loaded.name, loaded.ladder.below(loaded.bits), bits)
        self._widths, self._shortlist = draft_widths(loaded, bits)
        self._copied = CopiedRecord()
        self._rested = PAUSE  # steps without a draft since the last one: the first text begins with a try

    @property
    def name(self) -> str:
        return names_of(self._widths)

    def draft(self, asked: Sequence_[Asked], pool: PagePool) -> list[list[int]]:
        # A pass without drafts has a row of each text, as has every drafted one; checking adds as many for each guess.
        texts = len(asked)
        plain = rows_cost(texts)
        checked = [rows_cost(texts * (1 + count)) / plain for count in range(DRAFT_TOKENS)]
        costs = [(width.cost + plain - 1) / plain for width in self._widths]
        plan, index = best_width(self._widths, costs, checked)
        guesses, going = self._copy(asked, plan.rate, checked)
        if not plan.length:
            self._rested += 1
            if self._rested < PAUSE:
                return guesses
            plan = Plan(1.0, TRY, 0.0)
        tables = [asked[place].sequence.table for place in going]
        if not going or sum(table.missing(plan.length) for table in tables) > pool.available:
            return guesses
        self._rested = 0
        starts = [table.length for table in tables]
        self._go_on(asked, going, plan, self._widths[index], pool, guesses)
        for table, start in zip(tables, starts, strict=True):
            table.truncate(start)
        return guesses

    def _copy(
        self, asked: Sequence_[Asked], rate: float, checked: Sequence_[float]
    ) -> tuple[list[list[int]], list[int]]:
        """Guesses copied from the texts, where those give as many tokens per cost as a width; and the other texts.

        Args:
            asked: the texts.
            rate: tokens per cost of a width's draft.
            checked: see `WidthRecord.plan`.
        """
        guesses: list[list[int]] = []
        others = []
        for place, each in enumerate(asked):
            if each.drafts.ngram is None:
                each.drafts.ngram = NgramDrafter()
            copied = each.drafts.ngram.find(each.sequence.ids, min(MATCHED, each.room))
            copy = self._copied.plan(len(copied), checked)
            pays = copy.length > 0 and copy.rate >= rate
            guesses.append(copied[: copy.length] if pays else [])
            each.drafts.made = Made(None, match=len(copied)) if pays else None
            if not pays and each.room > 0:
                others.append(place)
        return guesses, others

    def _go_on(
        self,
        asked: Sequence_[Asked],
        going: list[int],
        plan: Plan,
        width: Width,
        pool: PagePool,
        guesses: list[list[int]],
    ) -> None:
        """Drafts for some of the texts, and writes into the pages behind them."""
        samplers = {index: asked[index].sampler.copy() for index in going}
        last = {index: asked[index].sequence.ids[-1] for index in going}
        made = {index: Made(width) for index in going}
        for index in going:
            asked[index].drafts.made = made[index]
        if self._shortlist is not None:
            for index in going:
                self._shortlist.add(asked[index].sequence.ids[-_RECENT:])
        for _ in range(plan.length):
            if not going:
                break
            rows = [asked[index].sequence.table for index in going]
            cache = Cache(pool, rows, max(row.length for row in rows) + 1)
            batch = Batch.of([[last[index]] for index in going], cache.lengths)
            adapters = np.array([asked[index].sequence.adapter for index in going], dtype=np.int64)
            if (adapters >= 0).any():
                batch = replace(batch, adapters=adapters)
            logits = np.ascontiguousarray(width.decoder.run(batch, cache), np.float32)
            found = sample_rows([samplers[index] for index in going], logits, range(len(going)))
            after = []
            for row, (index, token) in enumerate(zip(going, found, strict=True)):
                if isinstance(token, int):  # else the low planes have nothing to say
                    probability = top_probability(logits[row])
                    made[index].probabilities.append(probability)
                    guesses[index].append(token)
                    last[index] = token
                    if len(guesses[index]) < asked[index].room and probability >= plan.floor:
                        after.append(index)
            going = after

    def learn(self, drafts: TextDrafts, guessed: int, held: int, logits: NDArray[np.float32]) -> None:
        if self._shortlist is not None:
            self._shortlist.add_likely(logits)
        made, drafts.made = drafts.made, None
        if made is not None:
            made.record(self._copied, held, failed=held < guessed)


def batch_drafter(loaded: LoadedModel, speculate: str) -> BatchDrafter:
    """Who guesses for a served model.

    Args:
        loaded: the model.
        speculate: "ngram", "self" or "self:BITS".

    Raises:
        UsageError: none of these; a model that is not nested; one whose states of fixed size cannot go back.
    """
    if loaded.decoder.spec.states:
        raise UsageError(
            f"--speculate {speculate}: {loaded.name} is recurrent, and its states do not go back to before a guess: "
            "leave it out"
        )
    if asks_for_self(speculate):
        return SelfDrafts(loaded, draft_bits(speculate))
    if speculate != NGRAM:
        raise UsageError(f"--speculate {speculate}: a server drafts with ngram, self or self:3; name one of these")
    return NgramDrafts()
