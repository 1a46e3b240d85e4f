"""Which widths of a nested model draft for it, and which of them pays best.

What `kbit run`, `kbit chat` (kbit.engine.self_speculation) and the batch engine (kbit.engine.batch_speculation) have in
common.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kbit.engine.draft_policy import NO_DRAFT, CopiedRecord, Plan, WidthRecord
from kbit.engine.loader import LoadedModel
from kbit.engine.shortlist import ShortDecoder, Shortlist, can_shorten
from kbit.host.errors import UsageError
from kbit.models.decoder import Decoder

SELF = "self"
# Tokens of a text, or steps of a batch, from one try to the next where no draft pays, and how long a draft it is.
PAUSE, TRY = 64, 2
# Tokens before a copied draft that are compared with those before what it copies, at most.
MATCHED = 16

# What a pass takes beside reading weights, in shares of reading all of them.
_BESIDE = 0.08
# Widths that are tried where none is named. Narrower ones agree too rarely, wider ones cost too much.
_TRIED = (3, 4)


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
class Made:
    """Who made a draft, and how sure of it.

    Attributes:
        width: that made it; None: it was copied from the text.
        match: where it was copied, how many tokens before it were the same.
        probabilities: of a width's draft, the most likely token's at each place.
    """

    width: Width | None
    match: int = 0
    probabilities: list[float] = field(default_factory=list)

    def record(self, copied: CopiedRecord, held: int, failed: bool) -> None:
        """Counts what became of it.

        Args:
            copied: where copies are counted.
            held: so many of its tokens held,
            failed: and the next one did not; or none was left, or it was not checked.
        """
        if self.width is None:
            copied.record(self.match, held, failed)
        else:
            self.width.record.record(self.probabilities, held, failed)


def names_of(widths: Sequence[Width]) -> str:
    """Self, and what draft widths there are."""
    return f"{SELF}:{','.join(str(width.bits) for width in widths)}"


def best_width(widths: Sequence[Width], costs: Sequence[float], checked: Sequence[float]) -> tuple[Plan, int]:
    """The best of all widths' plans, and that width's index; no draft where there are no widths.

    Args:
        widths: that may draft.
        costs: of drafting a token with each, in those of a pass without a draft.
        checked: see `WidthRecord.plan`.
    """
    plans = [width.record.plan(cost, checked) for width, cost in zip(widths, costs, strict=True)]
    index = max(range(len(plans)), key=lambda i: plans[i].rate, default=0)
    return (plans[index] if plans else NO_DRAFT), index


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
