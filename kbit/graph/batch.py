"""Batch: the new tokens of several sequences, one after another without padding, as a forward pass takes them.

A prompt in pieces, a token for each of many texts, or both at once are the same thing here: every sequence has some new
tokens, at positions that go on where its earlier ones ended. The sequences are the rows of a `kbit.graph.cache.Cache`.

Dimension names: B sequences, R new tokens in all, L tokens whose results are wanted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Batch:
    """What a pass computes. Tokens of a sequence are consecutive, those of the first sequence first.

    Attributes:
        ids: int64 (R,), the tokens.
        counts: int64 (B,), new tokens of each sequence, 0 for one that rests.
        starts: int64 (B,), tokens each sequence had before.
        wanted: int64 (L,), ascending indices of the tokens whose hidden states or logits are wanted.
        prefixes: int64 (B,), how many tokens of each sequence see each other where the mask is "prefix"; 0 where these
            are not in this batch.
        types: int64 (R,), the tokens' types, for models that tell parts of a text apart by them; None: all 0.
        adapters: int64 (B,), which of the model's adapters each sequence has, -1 for none; None: none has any.
        features: float32 (R, F), what stands in place of ids where tokens are no words (of sound); None: ids do.
    """

    ids: Integers
    counts: Integers
    starts: Integers
    wanted: Integers
    prefixes: Integers
    types: Integers | None = None
    features: NDArray[np.float32] | None = None
    adapters: Integers | None = None

    @classmethod
    def of(
        cls,
        tokens: Sequence[Sequence[int]],
        starts: Sequence[int] | Integers,
        wanted: Literal["last", "all"] | Sequence[int] | Integers = "last",
        prefixes: Sequence[int] | Integers | None = None,
    ) -> Batch:
        """A batch from lists.

        Args:
            tokens: the new tokens of each sequence, B of them.
            starts: (B,), tokens each sequence has.
            wanted: whose results to compute: "last", of each sequence that has new tokens; "all"; or indices into all
                tokens, ascending.
            prefixes: (B,), how long a beginning of each sequence sees itself whole (mask "prefix"); None: none does.

        Raises:
            ValueError: `starts` is not one number per sequence; a prefix is not all in this batch.
        """
        if len(starts) != len(tokens):
            raise ValueError(f"{len(tokens)} sequences of tokens do not go with {len(starts)} starts")
        counts = np.array([len(part) for part in tokens], dtype=np.int64)
        ids = np.array([token for part in tokens for token in part], dtype=np.int64)
        return cls.packed(ids, counts, starts, wanted, prefixes)

    @classmethod
    def packed(
        cls,
        ids: Integers,
        counts: Sequence[int] | Integers,
        starts: Sequence[int] | Integers,
        wanted: Literal["last", "all"] | Sequence[int] | Integers = "last",
        prefixes: Sequence[int] | Integers | None = None,
    ) -> Batch:
        """As `of`, from tokens (R,) that lie one after another already, counts[b] of sequence b."""
        counts = np.asarray(counts, dtype=np.int64)
        starts = np.asarray(starts, dtype=np.int64)
        seen = np.zeros_like(counts)
        if prefixes is not None:
            seen = np.asarray(prefixes, dtype=np.int64)
            if seen.shape != counts.shape or (seen < 0).any() or ((seen > 0) & ((starts > 0) | (seen > counts))).any():
                raise ValueError("tokens that see each other go through the model at once: prefixes are in one batch")
        if isinstance(wanted, str):
            wanted = np.arange(len(ids)) if wanted == "all" else counts.cumsum()[counts > 0] - 1
        return cls(ids, counts, starts, np.asarray(wanted, dtype=np.int64), seen)

    @classmethod
    def of_features(cls, features: Sequence[NDArray[np.float32]]) -> Batch:
        """A batch of sequences that begin here and have no ids: float32 (R_b, F) each. All tokens are wanted."""
        counts = np.array([len(part) for part in features], dtype=np.int64)
        ids, rows = np.zeros(counts.sum(), dtype=np.int64), np.concatenate(features)
        return replace(cls.packed(ids, counts, np.zeros_like(counts), "all"), features=rows)

    def __len__(self) -> int:
        """R."""
        return len(self.ids)

    @property
    def lengths(self) -> Integers:
        """int64 (B,): tokens of each sequence once these are in."""
        return self.starts + self.counts

    @cached_property
    def sequences(self) -> NDArray[np.int32]:
        """int32 (R,): whose token each is."""
        return np.arange(len(self.counts), dtype=np.int32).repeat(self.counts)

    @cached_property
    def row_adapters(self) -> NDArray[np.int32] | None:
        """int32 (R,): the adapter of each token, -1 for none; None: none has any."""
        if self.adapters is None or (self.adapters < 0).all():
            return None
        return self.adapters.astype(np.int32).repeat(self.counts)

    @cached_property
    def bounds(self) -> Integers:
        """int64 (B + 1,): the tokens of sequence b are bounds[b] .. bounds[b + 1]."""
        return np.concatenate([np.zeros(1, dtype=np.int64), self.counts.cumsum()])

    @cached_property
    def positions(self) -> NDArray[np.int32]:
        """int32 (R,): where in its sequence each token is."""
        offsets = (self.starts - self.bounds[:-1]).astype(np.int32)
        return np.arange(len(self.ids), dtype=np.int32) + offsets.repeat(self.counts)

    def last_seen(self, mask: str) -> NDArray[np.int32]:
        """int32 (R,): the last position that each token sees of its own sequence, by a mask of `Attention`."""
        if mask == "causal":
            return self.positions
        if mask == "bidirectional":
            return (self.lengths - 1).astype(np.int32).repeat(self.counts)
        return np.maximum(self.positions, (self.prefixes - 1).astype(np.int32).repeat(self.counts))

    def passes(self, mask: str, most: int) -> Iterator[Batch]:
        """`pieces` of at most `most` tokens, but of all where some see later ones."""
        whole = mask == "bidirectional" or (mask == "prefix" and bool(self.prefixes.any()))
        return self.pieces(len(self.ids) if whole else most)

    def pieces(self, most: int) -> Iterator[Batch]:
        """The same tokens in batches of at most `most`, in order, over the same B sequences, without prefixes."""
        if len(self.ids) <= most:
            if len(self.ids):
                yield self
            return
        first = self.bounds[:-1]
        for begin in range(0, len(self.ids), most):
            end = min(begin + most, len(self.ids))
            done = np.clip(begin - first, 0, self.counts)  # of each sequence, in earlier pieces
            new = np.clip(end - first, 0, self.counts) - done
            low, high = np.searchsorted(self.wanted, (begin, end))
            types = None if self.types is None else self.types[begin:end]
            features = None if self.features is None else self.features[begin:end]
            wanted, prefixes = self.wanted[low:high] - begin, np.zeros_like(new)
            yield Batch(
                self.ids[begin:end], new, self.starts + done, wanted, prefixes, types, features, self.adapters
            )  # fmt: skip


def given_features(batch: Batch, width: int) -> NDArray[np.float32]:
    """What a batch brings of its tokens: float32 (R, width).

    Raises:
        ValueError: it brings ids alone, or features of another width.
    """
    features = batch.features
    if features is None or features.shape != (len(batch), width):
        what = "none" if features is None else f"{features.shape}"
        raise ValueError(f"a pass needs features ({len(batch)}, {width}) of its tokens, and has {what}")
    return features
