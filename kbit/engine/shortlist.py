"""Which tokens of a large vocabulary a draft may choose from, and a model that computes the logits of those alone.

The head is a quarter of what a model of 0.5 billion weights reads for a token, and most of what it says is that a token
is out of the question. A draft does without most of it: its tokens are those first in the vocabulary, which byte pair
encodings have in the order of how frequent they are (FR-Spec, Zhao et al. 2025), those the text has had lately, and
those that the model itself has thought likely at the last places. Of Qwen2.5-Coder 0.5B's 151,936 a fifth so chosen had
all but one in a hundred of the tokens of prose, code and chats. A token that is not among them is a guess that fails,
no more.

The head's rows lie in memory as kernels read them, 16 tokens together (a group). Those that are chosen are copied to
where they lie one after another: read from where they are, they would take two thirds of what the whole head takes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from kbit import _native
from kbit.backends.cpu.weight import NativeWeight
from kbit.graph.batch import Batch
from kbit.graph.cache import Cache
from kbit.models.decoder import Decoder

_GROUP = 16  # tokens: kPanelRows (kernels/cpu/codecs/matrix.h)
# Groups from which on a choice is worth it; the part that is chosen, and how many at least.
_MANY, _PART, _LEAST = 2048, 0.2, 1024
# Likely tokens that each place brings.
_LIKELY = 32


class Shortlist:
    """Groups of tokens: half of them the first of the vocabulary, half the latest.

    Args:
        vocab_size: V.

    Attributes:
        groups: int64 (G,), the group that each place has.
        part: of the vocabulary that is chosen.
    """

    def __init__(self, vocab_size: int) -> None:
        every = -(-vocab_size // _GROUP)
        size = min(every, max(_LEAST, int(_PART * every)))
        self.groups = np.arange(size)
        self.part = size / every
        self._fixed = size // 2
        self._places = {group: group for group in range(self._fixed, size)}  # the latest last

    def add(self, tokens: Iterable[int]) -> None:
        """Tokens of the text, or that may come, the likeliest last."""
        for token in tokens:
            group = token // _GROUP
            if group < self._fixed:
                continue
            place = self._places.pop(group, None)
            if place is None:
                place = self._places.pop(next(iter(self._places)))
                self.groups[place] = group
            self._places[group] = place

    def add_likely(self, logits: NDArray[np.float32]) -> None:
        """What logits (T, V) say is likely; rows that are not finite say nothing."""
        rows = np.ascontiguousarray(logits, np.float32)
        totals, ids = _scores(rows, min(_LIKELY, rows.shape[1]))
        self.add(token for row in ids[~np.isnan(totals)].tolist() for token in reversed(row))


class ShortDecoder:
    """A decoder that chooses from a shortlist (a `kbit.engine.prompt_cache.DecoderLike`).

    Args:
        decoder: on the native backend (`can_shorten`).
        shortlist: the tokens; it may change between calls.

    Attributes:
        spec: the decoder's.
    """

    def __init__(self, decoder: Decoder, shortlist: Shortlist) -> None:
        head = decoder.weights.head
        assert isinstance(head, NativeWeight)
        self.spec = decoder.spec
        self._shortlist = shortlist
        self._matrix = head.matrix.selection(len(shortlist.groups))
        self._groups = np.full(len(shortlist.groups), -1)  # that are in the selection
        weights = replace(decoder.weights, head=NativeWeight(self._matrix))
        self._decoder = Decoder(decoder.spec, decoder.backend, weights)

    def new_cache(self, batch: int, capacity: int) -> Cache:
        return self._decoder.new_cache(batch, capacity)

    def extend(self, ids: Sequence[int], cache: Cache, last_only: bool = True) -> NDArray[np.float32]:
        self._choose()
        return self._spread(self._decoder.extend(ids, cache, last_only))

    def run(self, batch: Batch, cache: Cache) -> NDArray[np.float32]:
        """`Decoder.run`; logits of tokens that are not chosen are -inf."""
        self._choose()
        return self._spread(np.asarray(self._decoder.run(batch, cache)))

    def _choose(self) -> None:
        """Copies the rows of what is new on the list."""
        places = np.flatnonzero(self._groups != self._shortlist.groups)
        if len(places):
            self._matrix.take(places, self._shortlist.groups[places])
            self._groups[places] = self._shortlist.groups[places]

    def _spread(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits (T, 16 G) of the chosen tokens as those of all, (T, V)."""
        vocab_size = self.spec.vocab_size
        every = -(-vocab_size // _GROUP)
        spread = np.full((len(logits), every, _GROUP), -np.inf, np.float32)
        spread[:, self._groups] = logits.reshape(len(logits), -1, _GROUP)
        return spread.reshape(len(logits), -1)[:, :vocab_size]


def can_shorten(decoder: Decoder) -> bool:
    """Whether a draft of this model can choose from a shortlist, and its vocabulary is so large that it should."""
    head, spec = decoder.weights.head, decoder.spec
    plain = not decoder.adapters and "head" not in decoder.weights.final.biases
    return isinstance(head, NativeWeight) and plain and head.shape[0] == spec.vocab_size > _MANY * _GROUP


def top_probability(logits: NDArray[np.float32]) -> float:
    """The probability of the most likely token of logits (V,); NaN where they are not finite."""
    totals, _ = _scores(np.ascontiguousarray(logits, np.float32)[None], 0)
    return 1 / float(totals[0])


def _scores(rows: NDArray[np.float32], top: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Of logits (T, V) the sums of e^(logit - largest), (T,), and the ids of the largest few (T, top), falling."""
    count = len(rows)
    best, totals = np.empty(count, np.float32), np.empty(count, np.float64)
    ids, values = np.empty((count, top), np.int64), np.empty((count, top), np.float32)
    _native.score_rows(rows, np.arange(count), best, totals, ids, values)
    return totals, ids
