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

from kbit.engine.draft_policy import CopiedRecord, Plan, WidthRecord
from kbit.engine.loader import LoadedModel
from kbit.engine.ngram import NgramDrafter
from kbit.engine.pass_costs import PassClock, rows_cost
from kbit.engine.prompt_cache import PromptCache
from kbit.engine.sampler import Guess, Sampler
from kbit.engine.shortlist import ShortDecoder, Shortlist, can_shorten, top_probability
from kbit.host.errors import UsageError
from kbit.models.decoder import Decoder

SELF = "self"

# What a pass takes beside reading weights, in shares of reading all of them.
_BESIDE = 0.08
# Widths that are tried where none is named. Narrower ones agree too rarely, wider ones cost too much.
_TRIED = (3, 4)
# With the token before it a draft is eight rows then, which AVX-512 multiplies with weights that are decoded once.
_LONGEST = 7
# Tokens from one try to the next where no draft pays, and how long a draft it is.
_PAUSE, _TRY = 64, 2
# Tokens before a draft that must match what a copy is of, at most.
_MATCHED = 16
# Tokens of a prompt whose like may come again.
_RECENT = 2048


@dataclass(eq=False)
class Width:
    """A width that drafts.

    Attributes:
        bits: how many.
        decoder: the model at this width; it may choose from a shortlist.
        cost: of a token, in shares of the full width's, by the bytes that are read.
        record: what became of its guesses.
    """

    bits: int
    decoder: Decoder | ShortDecoder
    cost: float
    record: WidthRecord


@dataclass(eq=False)
class _Draft:
    """The last draft: its tokens, where in the text it begins, and of whom; of a width also its probabilities."""

    begin: int
    tokens: list[int]
    width: Width | None
    probabilities: list[float]
    match: int = 0


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
        self._since = _PAUSE  # the first text begins with a try
        self._length = 0
        self._last: _Draft | None = None
        self._cache: PromptCache | None = None
        self._rows: NDArray[np.float32] | None = None

    @property
    def name(self) -> str:
        """Self, and what draft widths there are."""
        return f"{SELF}:{','.join(str(width.bits) for width in self._widths)}"

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
        copied = self._ngram.find(text, _MATCHED)
        copy = self._copied.plan(len(copied), checked)
        plan, index = self._best(checked, timed)
        if copy.length and copy.rate >= plan.rate:
            self._since = 0
            self._last = _Draft(len(text), copied[: copy.length], None, [], match=len(copied))
        elif plan.length or (self._widths and self._since >= _PAUSE):
            if timed and not self._clock.knows_one:
                return []
            self._since = 0
            plan = plan if plan.length else Plan(1.0, min(most, _TRY), 0.0)
            return self._draft(index, text, plan, sampler)
        return [] if self._last is None else [(token, None) for token in self._last.tokens]

    def _best(self, checked: Sequence[float], timed: bool) -> tuple[Plan, int]:
        """The best of all widths' plans, and the width's index."""
        costs = [self._clock.cost(i, each.cost) if timed else each.cost for i, each in enumerate(self._widths)]
        plans = [width.record.plan(cost, checked) for width, cost in zip(self._widths, costs, strict=True)]
        index = max(range(len(plans)), key=lambda i: plans[i].rate, default=0)
        return (plans[index] if plans else Plan(1.0, 0, 0.0)), index

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
        if last.width is None:
            self._copied.record(last.match, held, failed=held < len(became))
        else:
            last.width.record.record(last.probabilities, held, failed=held < len(became))

    def _draft(self, index: int, text: Sequence[int], plan: Plan, sampler: Sampler) -> list[Guess]:
        assert self._cache is not None, "attach() comes first"
        width = self._widths[index]
        guesses: list[Guess] = []
        self._last = last = _Draft(len(text), [], width, [])
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
                last.probabilities.append(probability)
                if len(guesses) == plan.length or guess[0] in self._end_ids or probability < plan.floor:
                    return guesses
                after = last.tokens[-1:]


def draft_widths(loaded: LoadedModel, asked: int | None) -> tuple[list[Width], Shortlist | None]:
    """The widths that may draft for a model at its own, and what tokens they choose from (None: all).

    Args:
        loaded: the model.
        asked: the one to draft with; None: some that often pay.
    """
    narrower = loaded.ladder.below(loaded.bits)
    tried = [bits for bits in narrower if bits in (_TRIED if asked is None else (asked,))]
    # (Where none of these is there, as of a file of 5 to 8 bits, the narrowest.)
    chosen = tried or (narrower[-1:] if asked is None else [])
    decoders = [loaded.at_width(bits).decoder for bits in chosen]
    shorten = bool(decoders) and all(can_shorten(decoder) for decoder in decoders)
    shortlist = Shortlist(loaded.decoder.spec.vocab_size) if shorten else None
    read = _bytes_read(loaded.decoder, 1.0)
    widths = []
    for bits, decoder in zip(chosen, decoders, strict=True):
        share = _bytes_read(decoder, shortlist.part if shortlist else 1.0) / read
        runs = ShortDecoder(decoder, shortlist) if shortlist else decoder
        widths.append(Width(bits, runs, (share + _BESIDE) / (1 + _BESIDE), WidthRecord(bits)))
    return widths, shortlist


def _bytes_read(decoder: Decoder, of_head: float) -> int:
    """Bytes of weights that a token reads, with such a share of the head; of an embedding apart from it, only a row."""
    weights = decoder.weights
    apart = weights.embedding.nbytes if weights.head is not weights.embedding else 0
    return weights.nbytes - apart - int((1 - of_head) * weights.head.nbytes)


def asks_for_self(name: str) -> bool:
    """Whether --speculate names the model itself."""
    return name == SELF or name.startswith(f"{SELF}:")


def draft_bits(name: str) -> int | None:
    """The width that --speculate self:BITS names; None where it names none.

    Raises:
        UsageError: it is no number of bits.
    """
    if name == SELF:
        return None
    text = name.removeprefix(f"{SELF}:")
    if not text.isdecimal():
        raise UsageError(f"--speculate {name}: write self, or self:3 for a draft at 3 bits")
    return int(text)


def check_widths(model: str, narrower: Sequence[int], bits: int | None) -> None:
    """
    Args:
        model: what the user called it.
        narrower: the whole numbers of bits that it serves below those it runs at, widest first.
        bits: the one that is asked for; None: any.

    Raises:
        UsageError: there are no narrower widths, or not the one that is asked for.
    """
    if not narrower:
        raise UsageError(
            f"--speculate {SELF}: {model} has no width below the one it runs at; make a model of several with kbit "
            "quantize --nested 2..8 and run it at more than 2 bits, or use --speculate ngram"
        )
    if bits is not None and bits not in narrower:
        raise UsageError(f"--speculate {SELF}:{bits}: {model} can draft at {narrower[-1]} to {narrower[0]} bits")
