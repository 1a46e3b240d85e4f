"""Slots: numbers under which clients keep the beginning of a text apart from others', save it and have it back.

A slot has no memory of its own. Its texts' pages are found by keys that begin with its number, so only by requests for
that slot; erased or restored, it begins with another key, and what was found by the old one goes when room is needed.
"""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from kbit.engine.sequence import Sequence
from kbit.graph.pages import OutOfPagesError, PagePool, pages_for
from kbit.host.errors import UnsupportedError, UsageError

# (index of the model's adapter or -1, number): of a slot.
SlotName = tuple[int, int]


@runtime_checkable
class SavableStore(Protocol):
    """A `kbit.graph.pages.PageStore` whose pages can be put on disk."""

    @property
    def kind(self) -> str:
        """What is stored: "fp16", "4", ..."""

    @property
    def page_bytes(self) -> int:
        """Bytes of a page."""

    def dump(self, page: int) -> bytes:
        """The bytes of a page."""

    def load(self, page: int, data: bytes) -> None:
        """Makes them those of a page."""


@dataclass(frozen=True)
class SavedText:
    """The beginning of a text, and its keys and values.

    Attributes:
        ids: the tokens, at least 1.
        pages: bytes of the pages that hold them.
    """

    ids: list[int]
    pages: list[bytes]


class Slots:
    """What is known of the slots of one engine. On its thread only.

    Args:
        pool: the engine's.
    """

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._begun: dict[SlotName, int] = {}  # how often each began anew
        self._last: dict[SlotName, list[int]] = {}

    def kind(self, name: SlotName) -> bytes:
        """What the keys of a slot's texts begin with."""
        return b"slot %d, %d" % (name[1], self._begun.get(name, 0))

    def note(self, name: SlotName, kind: bytes, ids: Tokens[int]) -> None:
        """These tokens are in the cache, of the text last answered for a slot; unless it began anew since."""
        if ids and kind == self.kind(name):
            self._last[name] = list(ids)

    def erase(self, name: SlotName) -> int:
        """Begins a slot anew; how many tokens it had."""
        self._begun[name] = self._begun.get(name, 0) + 1
        return len(self._last.pop(name, ()))

    def save(self, name: SlotName) -> SavedText:
        """The text last answered for a slot, as much of it as is still in the cache.

        Raises:
            UsageError: there is none.
            UnsupportedError: see `store`.
        """
        store = self.store()
        text = self._sequence(name, self._last.get(name, []))
        text.find_beginning()
        length = text.table.length
        saved = SavedText(text.ids[:length], [store.dump(page) for page in text.table.pages])
        text.publish_end()  # for it to stay where it was found
        text.table.release()
        if not length:
            raise UsageError(f"slot {name[1]} is empty: have a request with id_slot {name[1]} answered first")
        return saved

    def restore(self, name: SlotName, saved: SavedText) -> None:
        """Begins a slot anew with a text, for which room is made of pages that nobody uses.

        Raises:
            OutOfPagesError: there are not enough of them; nothing changed.
            UnsupportedError: see `store`.
        """
        store = self.store()
        needed = pages_for(len(saved.ids))
        assert len(saved.pages) == needed
        if needed > self._pool.available:
            raise OutOfPagesError(
                f"{len(saved.ids)} tokens need {needed} pages of the KV cache, of which {self._pool.available} are "
                "free: try again when fewer answers are being written"
            )
        self.erase(name)
        text = self._sequence(name, saved.ids)
        text.table.reserve(len(saved.ids))
        for page, data in zip(text.table.pages, saved.pages, strict=True):
            store.load(page, data)
        text.table.advance(len(saved.ids))
        text.computed(len(saved.ids))
        text.publish_end()
        text.table.release()
        self._last[name] = list(saved.ids)

    def _sequence(self, name: SlotName, ids: list[int]) -> Sequence:
        """A text of a slot, with a token more that is never computed: a sequence has one."""
        return Sequence(self._pool, [*ids, 0], adapter=name[0], slot=self.kind(name))

    def store(self) -> SavableStore:
        """Where the pages are.

        Raises:
            UnsupportedError: this kind of model or backend saves no slots.
        """
        if self._pool.states is not None:
            raise UnsupportedError("slots of a recurrent model are not saved: its states are not in pages")
        if not isinstance(self._pool.store, SavableStore):
            raise UnsupportedError(
                "slots are saved where models run on the native backend: start with --backend native"
            )
        return self._pool.store
