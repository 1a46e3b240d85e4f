"""Speculative decoding: a cheap drafter guesses the next tokens, and one pass of the model checks all guesses at once.

A pass over T + 1 tokens costs little more than one over a single token while the weights have to be read from memory
either way, so each guess that holds is a token almost for free. Nothing is lost for it: a greedy text is the same token
for token, a sampled one has the same distribution (`Sampler.verify` has the rule and its sources), because every token
is decided by the model's own logits, in order, with the penalties as they are at that token.

Drafters are prompt lookup (kbit.engine.ngram), a smaller model with the same vocabulary, and the model itself at fewer
bits (kbit.engine.self_speculation).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from kbit.engine.ngram import NgramDrafter
from kbit.engine.prompt_cache import DecoderLike, PromptCache
from kbit.engine.sampler import Guess, Logits, Sampler
from kbit.host.errors import KbitError, UsageError

if TYPE_CHECKING:
    from kbit.checkpoint.source import CheckpointSource
    from kbit.engine.loader import LoadedModel
    from kbit.text.tokenizer import Tokenizer

NGRAM = NgramDrafter.name
DRAFT_TOKENS = 8
MAX_DRAFT_TOKENS = 64  # bounds the logits of a pass: (65, V) float32, 67 MB for a vocabulary of 256k

# Prompt tokens that go through a draft model at once, as in kbit.engine.generate.
_PREFILL_CHUNK = 512
_FIRST_DRAFT = 4


class Drafter(Protocol):
    """Whoever guesses. It can never change what is generated, only how fast."""

    @property
    def name(self) -> str:
        """For reports."""

    @property
    def context(self) -> int | None:
        """Longest text it can work on, its draft included; None for any."""

    def start(self, prompt_ids: Sequence[int], *, room: int, end_ids: Collection[int], vocab_size: int) -> None:
        """A new text begins.

        Args:
            prompt_ids: what there is of it.
            room: tokens it can grow by at most.
            end_ids: ids that end it: nothing needs to be drafted after one.
            vocab_size: ids from here on are none of the model's.
        """

    def propose(self, text: Sequence[int], most: int, sampler: Sampler) -> list[Guess]:
        """Guesses at the next tokens, at most `most` (1 or more), possibly none.

        Args:
            text: the prompt and all tokens after it, the same as at the last call but for what was added since.
            most: how many to make; text and draft together are no longer than `context`.
            sampler: the generation's, which knows how tokens are chosen.
        """


@runtime_checkable
class SharesCache(Protocol):
    """A drafter that drafts in the model's own cache, and chooses itself how much (kbit.engine.self_speculation)."""

    def attach(self, cache: PromptCache) -> None:
        """The cache of the next text; comes before `start`."""

    def passed(self, logits: NDArray[np.float32], seconds: float | None) -> None:
        """What the model has just said.

        Args:
            logits: (T, V), after each token of the pass, of which the first say what came next; or after the prompt.
            seconds: that the pass took; None of the prompt.
        """


@dataclass(frozen=True)
class Speculation:
    """How to speculate.

    Attributes:
        drafter: who guesses. It keeps state between the generations that share it, which must not overlap.
        draft_tokens: most tokens of a draft.

    Raises:
        UsageError: draft_tokens is out of range.
    """

    drafter: Drafter
    draft_tokens: int = DRAFT_TOKENS

    def __post_init__(self) -> None:
        check_draft_tokens(self.draft_tokens)


@dataclass(frozen=True)
class SpeculationReport:
    """What speculation did in one generation.

    Attributes:
        drafter: its name.
        passes: passes of the model that checked a draft.
        drafted: tokens in these drafts.
        accepted: those of them that became part of the answer.
        note: why drafts were cut short or left out, where they were; else None.
    """

    drafter: str
    passes: int
    drafted: int
    accepted: int
    note: str | None

    @property
    def acceptance_rate(self) -> float | None:
        """Share of drafted tokens that were accepted; None where nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else None


class SpeculativeTokens:
    """The tokens of one generation, as `plain_tokens` in kbit.engine.generate makes them, only sooner.

    How much is drafted follows what was accepted: a draft that held is followed by one twice as long, another by one
    with a single token more than held; a drafter that shares the model's cache says so itself. Time plays no part where
    the text depends on drafts, as sampled text does: the same seed gives the same text.

    Args:
        speculation: who drafts, and how much at most.
        cache: the model's, with the prompt in it. Guesses that failed are taken out again before the next pass; after
            the last one, some may be left behind the text (PromptCache.ids has them).
        sampler: chooses tokens.
        prompt_ids: the prompt.
        room: most tokens that will be asked for; the cache holds the prompt and this many.
        end_ids: ids after which no more will be asked for.
        vocab_size: V of the model.
        one_by_one_from: text length beyond which several tokens in one pass give other logits than one by one (RoPE
            that depends on the length): nothing is drafted there.
    """

    def __init__(
        self,
        speculation: Speculation,
        cache: PromptCache,
        sampler: Sampler,
        prompt_ids: Sequence[int],
        *,
        room: int,
        end_ids: Collection[int],
        vocab_size: int,
        one_by_one_from: int,
    ) -> None:
        self._drafter = speculation.drafter
        self._cache = cache
        self._sampler = sampler
        self._text = list(prompt_ids)
        self._end = len(self._text) + room
        self._most = speculation.draft_tokens
        self._length = min(_FIRST_DRAFT, self._most)
        self._limit, self._reason = one_by_one_from, "the model's RoPE depends on the length of the text"
        if self._drafter.context is not None and self._drafter.context < one_by_one_from:
            self._limit, self._reason = self._drafter.context, "the draft model's context ends there"
        self._passes = self._drafted = self._accepted = 0
        self._note: str | None = None
        self._steers = isinstance(self._drafter, SharesCache)
        if isinstance(self._drafter, SharesCache):
            self._drafter.attach(cache)
        self._drafter.start(prompt_ids, room=room, end_ids=end_ids, vocab_size=vocab_size)

    @property
    def report(self) -> SpeculationReport:
        """What was done up to now."""
        return SpeculationReport(self._drafter.name, self._passes, self._drafted, self._accepted, self._note)

    def run(self, logits: Logits) -> Iterator[int]:
        """Yields tokens for as long as they are asked for.

        Args:
            logits: (V,), those after the prompt.
        """
        if isinstance(logits, np.ndarray):
            self._passed(logits[None], None)
        yield self._add(self._sampler.sample(logits))
        while True:
            guesses = self._guesses()
            begin = perf_counter()
            if not guesses:
                row = self._cache.extend(self._text[-1:])
                self._passed(row[None], perf_counter() - begin)
                yield self._add(self._sampler.sample(row))
                continue
            self._cache.keep(draft=True)
            rows = self._cache.extend_all([self._text[-1], *(token for token, _ in guesses)])  # (T + 1, V)
            self._passed(rows, perf_counter() - begin)
            self._passes += 1
            self._drafted += len(guesses)
            held = 0
            # The consumer may stop at any token. So each is decided only when it is asked for: the sampler never counts
            # a token that is not in the text.
            for row, (guess, proposal) in zip(rows, guesses, strict=False):
                token = self._sampler.verify(row, guess, proposal)
                held += token == guess
                self._accepted += token == guess
                yield self._add(token)
                if token != guess:
                    break
            else:
                yield self._add(self._sampler.sample(rows[-1]))
            self._cache.truncate(len(self._text) - 1)
            self._length = min(self._most, 2 * self._length if held == len(guesses) else held + 1)

    def _passed(self, logits: NDArray[np.float32], seconds: float | None) -> None:
        if isinstance(self._drafter, SharesCache):
            self._drafter.passed(logits, seconds)

    def _add(self, token: int) -> int:
        self._text.append(token)
        return token

    def _guesses(self) -> list[Guess]:
        # A pass gives one token more than the draft has.
        most = min(self._most if self._steers else self._length, self._end - len(self._text) - 1)
        if most > self._limit - len(self._text):
            most = self._limit - len(self._text)
            self._note = f"no drafts beyond {self._limit} tokens: {self._reason}"
        return self._drafter.propose(self._text, most, self._sampler) if most > 0 else []


class DraftModel:
    """A smaller model with the same vocabulary, which drafts with the sampler's own settings on its own logits.

    Args:
        name: what to call it in messages.
        decoder: the model.
    """

    def __init__(self, name: str, decoder: DecoderLike) -> None:
        self.name = name
        self.context = decoder.spec.max_positions
        self._cache = PromptCache(decoder)
        self._known = 0  # tokens of the cache that are known to be the text's
        self._end_ids: Collection[int] = ()
        self._vocab_size = 0

    def start(self, prompt_ids: Sequence[int], *, room: int, end_ids: Collection[int], vocab_size: int) -> None:
        """Keeps what the prompt shares with the last text."""
        self._end_ids, self._vocab_size = end_ids, vocab_size
        if len(prompt_ids) < self.context:  # else it will not be asked
            self._known = self._cache.start(prompt_ids, min(self.context, len(prompt_ids) + room))

    def propose(self, text: Sequence[int], most: int, sampler: Sampler) -> list[Guess]:
        """`most` tokens, or fewer if one of them ends the text."""
        logits = self._read(text)
        guesses: list[Guess] = []
        tokens: list[int] = []
        while True:
            try:
                # Models of one family may pad their logits to different sizes.
                guess = sampler.propose(logits[: self._vocab_size], tokens)
            except KbitError as error:
                raise KbitError(f"draft model {self.name}: {error}") from None
            guesses.append(guess)
            tokens.append(guess[0])
            if len(tokens) == most or guess[0] in self._end_ids:
                return guesses
            logits = self._cache.extend(tokens[-1:])

    def _read(self, text: Sequence[int]) -> Logits:
        """The logits after the text, whose beginning and maybe part of the last draft are in the cache."""
        ids = self._cache.ids
        # The last token always goes through the model: its logits are wanted.
        while self._known < min(len(ids), len(text) - 1) and ids[self._known] == text[self._known]:
            self._known += 1
        self._cache.truncate(self._known)
        for begin in range(self._known, len(text), _PREFILL_CHUNK):
            logits = self._cache.extend(text[begin : begin + _PREFILL_CHUNK])
        self._cache.keep(draft=True)
        self._known = len(text)
        return logits


def check_draft_tokens(draft_tokens: int) -> None:
    """
    Raises:
        UsageError: not 1 to MAX_DRAFT_TOKENS.
    """
    if not 1 <= draft_tokens <= MAX_DRAFT_TOKENS:
        raise UsageError(f"--draft-tokens {draft_tokens}: expected 1 to {MAX_DRAFT_TOKENS}")


def load_drafter(name: str, model: str, tokenizer: Tokenizer, load: Callable[..., LoadedModel]) -> Drafter:
    """The drafter that --speculate names.

    Args:
        name: "ngram", or a draft model by any name a model can have (a folder called ngram is "./ngram").
        model: what the user calls the model that is to be sped up.
        tokenizer: that model's.
        load: load_model or the like: called with the name and `check`.

    Raises:
        UsageError: no such model, or one with another vocabulary.
        CheckpointError, UnsupportedError: the draft model cannot be read or run.
    """
    if name == NGRAM:
        return NgramDrafter()

    def check(theirs: Tokenizer, _: CheckpointSource) -> None:
        if not theirs.has_vocabulary_of(tokenizer):
            raise UsageError(
                f"--speculate {name}: its vocabulary is not that of {model}, so it cannot draft for it: name a smaller "
                "model of the same family, or use --speculate ngram"
            )

    loaded = load(name, check=check)
    return DraftModel(name, loaded.decoder)
