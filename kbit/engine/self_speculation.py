"""Self-speculation: the low planes of a nested model draft, and all of them check. No second model is in memory.

The draft goes into the model's own cache, behind keys and values that the full width has written, and is taken out
again before the check, which writes them anew. So a draft begins from what is exact, and what it leaves is overwritten.

Width and length follow what was accepted. One pass over all planes costs 1, a drafted token the share of bytes that
its width reads and what both take beside, a checked one a little of the full pass: that gives the tokens per cost for
every width and length, at the acceptance measured so far. Where no draft pays, none is made, but for a short one now
and then that measures again. Time plays no part, so the same seed gives the same text (kbit.engine.speculative).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from kbit.engine.loader import LoadedModel
from kbit.engine.prompt_cache import PromptCache
from kbit.engine.sampler import Guess, Sampler
from kbit.host.errors import UsageError
from kbit.models.decoder import Decoder

SELF = "self"

# What each token that is checked adds to a pass, in shares of a pass of one token (docs/speculation.md).
_CHECKED = 0.09
# What a pass takes beside reading weights, in shares of reading all of them.
_BESIDE = 0.1
# Widths that are tried where none is named. Narrower ones agree too rarely, wider ones cost too much.
_TRIED = (3, 4)
# Accepted and rejected guesses that a width is taken to have had before its first.
_ACCEPTED, _REJECTED = 4.0, 1.0
# How fast what was measured before is forgotten, for each guess that was checked.
_FADE = 0.98
# With the token before it a draft is eight rows then, which AVX-512 multiplies with weights that are decoded once.
_LONGEST = 7
# Tokens from one try to the next where no draft pays, and how long a draft it is.
_PAUSE, _TRY = 64, 2


@dataclass
class Width:
    """A width that drafts.

    Attributes:
        bits: how many.
        cost: of a token, in shares of the full width's.
        accepted, rejected: guesses, the latest counting most.
    """

    bits: int
    cost: float
    accepted: float = _ACCEPTED
    rejected: float = _REJECTED

    @property
    def acceptance(self) -> float:
        """The share of guesses that hold where all before them did."""
        return self.accepted / (self.accepted + self.rejected)

    def record(self, held: int, failed: bool) -> None:
        """Of a draft so many guesses held, and then one failed, or none was left."""
        for accepted, count in ((True, held), (False, int(failed))):
            for _ in range(count):
                self.accepted = _FADE * self.accepted + accepted
                self.rejected = _FADE * self.rejected + (not accepted)

    def best_length(self, most: int, texts: int = 1) -> tuple[float, int]:
        """Tokens per cost of the best draft of at most so many tokens, and its length; without one it is (1, 0).

        Of several texts that are drafted and checked together, a pass without a draft has a row of each, and so has
        every drafted one; checking adds as many for each guess.
        """
        more = (self.cost + _CHECKED * (2 * texts - 1)) / (1 + _CHECKED * (texts - 1))
        best, share, tokens = (1.0, 0), 1.0, 1.0
        for length in range(1, most + 1):
            share *= self.acceptance
            tokens += share
            rate = tokens / (1 + length * more)
            best = max(best, (rate, length))
        return best


class SelfDrafter:
    """Drafts with narrower widths of the model itself (a `kbit.engine.speculative.Drafter`).

    Args:
        loaded: the model, at the width that checks.
        bits: the width that drafts; None: chosen by what is accepted.

    Raises:
        UsageError: the model is not nested, or does not serve this width.
    """

    def __init__(self, loaded: LoadedModel, bits: int | None = None) -> None:
        check_widths(loaded.name, [width for width in loaded.widths if width <= (loaded.bits or 0)], bits)
        self._asked = bits
        self.follow(loaded)

    def follow(self, loaded: LoadedModel) -> None:
        """Draft for the model at another width."""
        found = draft_widths(loaded, self._asked)
        self._widths = [width for width, _ in found]
        self._decoders = {width.bits: decoder for width, decoder in found}
        self._since = _PAUSE  # the first text begins with a try
        self._length = 0
        self._last: tuple[Width, list[int]] | None = None
        self._cache: PromptCache | None = None

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
        self._end_ids, self._last = end_ids, None
        self._length = len(prompt_ids)

    def propose(self, text: Sequence[int], most: int, sampler: Sampler) -> list[Guess]:
        """As many tokens as pay at the acceptance measured so far."""
        self._learn(text)
        self._since += len(text) - self._length
        self._length = len(text)
        if not self._widths:
            return []
        most = min(most, _LONGEST)
        (_, length), width = max(
            ((width.best_length(most), width) for width in self._widths), key=lambda found: found[0]
        )
        if length == 0:
            if self._since < _PAUSE:
                return []
            length = min(most, _TRY)
        self._since = 0
        guesses = self._draft(self._decoders[width.bits], text, length, sampler)
        self._last = (width, [token for token, _ in guesses])
        self._start_of_last = len(text)
        return guesses

    def _learn(self, text: Sequence[int]) -> None:
        """What became of the last draft."""
        if self._last is None:
            return
        width, guessed = self._last
        self._last = None
        became = text[self._start_of_last : self._start_of_last + len(guessed)]
        held = 0
        while held < len(became) and became[held] == guessed[held]:
            held += 1
        width.record(held, failed=held < len(became))

    def _draft(self, decoder: Decoder, text: Sequence[int], length: int, sampler: Sampler) -> list[Guess]:
        assert self._cache is not None, "attach() comes first"
        guesses: list[Guess] = []
        tokens: list[int] = []
        self._cache.keep(draft=True)
        with self._cache.drafted_by(decoder) as cache:
            logits = cache.extend(text[-1:])
            while True:
                guess = sampler.propose(logits, tokens)
                guesses.append(guess)
                tokens.append(guess[0])
                if len(tokens) == length or guess[0] in self._end_ids:
                    return guesses
                logits = cache.extend(tokens[-1:])


def draft_widths(loaded: LoadedModel, asked: int | None) -> list[tuple[Width, Decoder]]:
    """The widths that may draft for a model at its own, and what runs them.

    Args:
        loaded: the model.
        asked: the one to draft with; None: some that often pay.
    """
    narrower = [bits for bits in loaded.widths if bits < (loaded.bits or 0)]
    tried = [bits for bits in narrower if bits in (_TRIED if asked is None else (asked,))]
    # (Where none of these is there, as of a file of 5 to 8 bits, the narrowest.)
    chosen = tried or (narrower[-1:] if asked is None else [])
    decoders = [(bits, loaded.at_width(bits).decoder) for bits in chosen]
    read = _bytes_read(loaded.decoder)
    shares = [_bytes_read(decoder) / read for _, decoder in decoders]
    return [
        (Width(bits, (share + _BESIDE) / (1 + _BESIDE)), decoder)
        for (bits, decoder), share in zip(decoders, shares, strict=True)
    ]


def _bytes_read(decoder: Decoder) -> int:
    """Bytes of weights that a token reads: of an embedding that is not the head too, only a row."""
    weights = decoder.weights
    return weights.nbytes - (weights.embedding.nbytes if weights.head is not weights.embedding else 0)


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


def check_widths(model: str, widths: Sequence[int], bits: int | None) -> None:
    """
    Raises:
        UsageError: there are no narrower widths, or not the one that is asked for.
    """
    if len(widths) < 2:
        raise UsageError(
            f"--speculate {SELF}: {model} has one width; make a model of several with kbit quantize --nested 2..8, or "
            "use --speculate ngram"
        )
    if bits is not None and bits not in widths[1:]:
        raise UsageError(f"--speculate {SELF}:{bits}: {model} can draft at {widths[-1]} to {widths[1]} bits")
