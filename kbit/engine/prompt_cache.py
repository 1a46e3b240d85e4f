"""The KV cache of one sequence, and which tokens are in it.

Two requests that begin alike (the turns of a conversation) share the work of their common beginning.

A recurrent model can go back only to where its states were kept. So they are kept at some places (`keep`), and what
lies between such a place and where a text is to go on goes through the model once more, together with the next tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kbit.graph.cache import Cache
from kbit.host.errors import KbitError, UsageError


class DecoderSpec(Protocol):
    """What generation and evaluation need to know about a model (a `kbit.models.spec.ModelSpec`)."""

    @property
    def max_positions(self) -> int:
        """Tokens of context."""

    @property
    def longest_in_pieces(self) -> int:
        """Longest text that may go through the model piece by piece."""

    @property
    def begins_anew_beyond(self) -> int | None:
        """Length beyond which the keys of a text are others, once, or None."""

    @property
    def vocab_size(self) -> int:
        """V."""


class DecoderLike(Protocol):
    """A model that can generate: `kbit.models.decoder.Decoder` or the like."""

    @property
    def spec(self) -> DecoderSpec:
        """Its sizes."""

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """An empty cache."""

    def extend(self, ids: Sequence[int], cache: Cache, last_only: bool = True) -> NDArray[np.float32]:
        """T tokens of one sequence -> logits (T, V), or (1, V) with last_only; the tokens are then in the cache."""


# States that are kept at once of a recurrent model: at the ends of pieces of prompts, the latest; and before drafts.
# Fewer where they are large, but one.
_KEPT, _KEPT_BYTES = 4, 256 << 20
# Tokens that go through the model again with the next ones; more go by themselves, after which states can be kept.
_AGAIN = 8


class PromptCache:
    """A cache of one row that keeps the longest common beginning from one prompt to the next.

    It starts as large as the first prompt needs and grows by doubling.
    """

    def __init__(self, decoder: DecoderLike) -> None:
        self._decoder = decoder
        self._cache: Cache | None = None
        self._ids: list[int] = []  # of which the last may be gone from the cache
        self._kept: list[int] = []
        self._draft: int | None = None

    @property
    def ids(self) -> Sequence[int]:
        """The tokens in the cache, and those that are to go there with the next."""
        return self._ids

    def start(self, prompt_ids: Sequence[int], capacity: int) -> int:
        """Prepares for a prompt, keeping what it shares with the last one.

        Args:
            prompt_ids: the whole prompt.
            capacity: tokens the cache must hold, answer included.

        Returns:
            How many tokens of the prompt are in the cache; at least one is not, as its logits are needed.

        Raises:
            KbitError: there is no memory for a cache of this size.
        """
        shared = 0
        for cached, wanted in zip(self._ids, prompt_ids[:-1], strict=False):
            if cached != wanted:
                break
            shared += 1
        del self._ids[shared:]
        if self._cache is None:
            with _memory_for(capacity):
                self._cache = self._decoder.new_cache(1, capacity)
        shared = self._go_back(self._cache, shared)
        del self._ids[shared:]
        if self._cache.capacity < capacity:
            larger = min(self._decoder.spec.max_positions, max(capacity, 2 * self._cache.capacity))
            with _memory_for(larger):
                self._cache.grow(larger)
        return shared

    def extend(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Runs tokens through the model behind those in the cache; the logits after the last one, (V,)."""
        logits: NDArray[np.float32] = self._forward(ids, last_only=True)[-1]
        return logits

    def extend_all(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Runs T tokens through the model in one pass; the logits after each of them, (T, V)."""
        return self._forward(ids, last_only=False)

    def truncate(self, length: int) -> None:
        """Forgets every token from position `length` on."""
        if length < len(self._ids):
            assert self._cache is not None, "start() comes first"
            del self._ids[length:]
            self._go_back(self._cache, length)

    @contextmanager
    def drafted_by(self, decoder: DecoderLike) -> Iterator[PromptCache]:
        """Within it tokens go through another width of the same model. They are taken out again at its end.

        Args:
            decoder: with caches of the same kind, on the same backend.
        """
        length, own = len(self._ids), self._decoder
        self._decoder = decoder
        try:
            yield self
        finally:
            self._decoder = own
            self.truncate(length)

    def keep(self, *, draft: bool = False) -> None:
        """Makes it cheap to come back to here: keeps the states of a recurrent model, and lets go of the oldest.

        Args:
            draft: until the next such call only, as what follows is a draft.
        """
        if self._cache is None or self._cache.pool.states is None or not self._ids:
            return
        length = self._cache.rows[0].length
        if len(self._ids) - length > _AGAIN:
            self._decoder.extend(self._ids[length:], self._cache)
            length = len(self._ids)
        if self._draft is not None and self._draft != length and self._draft not in self._kept:
            self._cache.forget(self._draft)
        self._draft = length if draft else None
        self._cache.snapshot()
        if not draft and length not in self._kept:
            self._kept.append(length)
            while len(self._kept) > kept_states(self._cache.pool.states.store.page_bytes):
                self._cache.forget(self._kept.pop(0))

    def _go_back(self, cache: Cache, length: int) -> int:
        """Takes tokens out of the cache so that at most `length` are left; how many are."""
        left = cache.kept_before(length)
        cache.truncate(left)
        self._kept = [kept for kept in self._kept if kept <= left]
        if self._draft is not None and self._draft > left:
            self._draft = None
        return left

    def _forward(self, ids: Sequence[int], last_only: bool) -> NDArray[np.float32]:
        assert self._cache is not None, "start() comes first"
        again = self._ids[self._cache.rows[0].length :]
        limit = self._decoder.spec.begins_anew_beyond
        if limit is not None and 0 < len(self._ids) <= limit < len(self._ids) + len(ids):
            self._cache.truncate(0)
            rows = self._decoder.extend([*self._ids, *ids], self._cache, last_only)[-len(ids) :]
        elif again:
            rows = self._decoder.extend([*again, *ids], self._cache, last_only)[-len(ids) :]
        else:
            rows = self._decoder.extend(ids, self._cache, last_only)
        self._ids.extend(ids)
        return rows


def kept_states(nbytes: int) -> int:
    """How many states of such a size are kept at most, beside those of a pass and of a draft."""
    return max(1, min(_KEPT, _KEPT_BYTES // max(1, nbytes)))


def check_prompt(ids: Sequence[int], spec: DecoderSpec) -> None:
    """
    Raises:
        UsageError: the prompt is empty, leaves no room for an answer in the model's context, or has ids the model does
            not know.
    """
    if not ids:
        raise UsageError("the prompt is empty: give some text")
    if len(ids) >= spec.max_positions:
        raise UsageError(
            f"the prompt has {len(ids)} tokens and the model's context is {spec.max_positions}, answer included: "
            "shorten the prompt, or use a model with a longer context"
        )
    check_vocabulary(ids, spec.vocab_size)


def check_vocabulary(ids: Sequence[int], vocab_size: int) -> None:
    """
    Raises:
        UsageError: an id the model has no embedding for: tokenizer and model do not belong together.
    """
    for worst in (min(ids, default=0), max(ids, default=0)):
        if not 0 <= worst < vocab_size:
            raise UsageError(
                f"token id {worst} is outside the model's vocabulary of {vocab_size}: "
                "the tokenizer does not belong to this model"
            )


@contextmanager
def _memory_for(capacity: int) -> Iterator[None]:
    """Turns exhausted memory into a KbitError that names the tokens it was for."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch reports exhausted memory as a RuntimeError
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        raise KbitError(
            f"not enough memory for a KV cache of {capacity} tokens: lower --max-tokens or shorten the prompt"
        ) from None
