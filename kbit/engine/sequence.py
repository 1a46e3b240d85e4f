"""Sequence: a text that a model works on, between its first token and its last."""

from __future__ import annotations

from collections.abc import Sequence as Tokens

from kbit.graph.block_table import BlockTable
from kbit.graph.pages import PAGE, PagePool
from kbit.graph.prefix_keys import prefix_keys


class Sequence:
    """Tokens, how many of them have been through the model, and from where on results are wanted.

    Every position from `wanted_from` on is answered once, with the logits (or hidden states) of what follows. Whoever
    reads them may append tokens, which then are the next to be computed. A sequence whose pages were taken away is
    computed again, from its beginning, but not answered again.

    Args:
        pool: of the model's pages.
        ids: the tokens there are, at least 1.
        wanted_from: first position whose result is wanted; the last of `ids` unless given.
        whole: all tokens must go through the model in one pass, as where rotations depend on the length of the text.
            Such a sequence shares no pages by its tokens.
        table: pages that hold the first of these tokens already, as a fork of another sequence's.
        adapter: which of the model's adapters it has (`Decoder.adapters`), -1 for none. Sequences share pages only with
            those of the same.
        slot: likewise.

    Attributes:
        ids: the tokens. `append` adds to them.
        table: their pages.
        whole, adapter, slot: as given.
        wanted_from: first position that has not been answered.
        draft: guesses at the tokens after the last, which the next pass computes, too, if there is room; `settle` says
            what became of them.

    Raises:
        ValueError: no tokens, or `table` has results of positions that are wanted.
    """

    def __init__(
        self,
        pool: PagePool,
        ids: Tokens[int],
        *,
        wanted_from: int | None = None,
        whole: bool = False,
        table: BlockTable | None = None,
        adapter: int = -1,
        slot: bytes = b"",
    ) -> None:
        self.ids = list(ids)
        self.wanted_from = len(self.ids) - 1 if wanted_from is None else wanted_from
        self.whole = whole
        self.adapter = adapter
        self.slot = slot
        self.draft: list[int] = []
        self.table = BlockTable(pool) if table is None else table
        if not self.ids or self.table.length > min(self.wanted_from, len(self.ids) - 1):
            raise ValueError("a sequence has tokens that are still to be computed, those that are wanted among them")
        self._keys: list[bytes] = []  # of the full pages of `ids`, as far as they were needed

    @property
    def pending(self) -> int:
        """Tokens that are to go through the model."""
        return len(self.ids) - self.table.length

    def append(self, token: int) -> None:
        """One token more."""
        self.ids.append(token)

    def find_beginning(self) -> None:
        """Takes over pages of sequences that began alike, and a copy of the one in which they come to differ; only for
        one that has none of its own."""
        if not self.whole and not self.table.pages:
            stop = min(self.wanted_from, len(self.ids) - 1)
            found = self.table.match(self._page_keys(stop), self.ids)
            self.table.match_part(self._before(found), self.ids[found : min(stop, found + PAGE)])

    def publish_end(self) -> None:
        """Lets others find the last page, too. Nothing is computed for this sequence any more."""
        length = self.table.length
        if not self.whole and not self.draft and length % PAGE:  # (with a draft, the end may be guesses)
            full = length - length % PAGE
            self.table.publish_part(self._before(full), self.ids[full:length])

    def computed(self, count: int) -> int:
        """Counts `count` tokens that went through the model, the cache has counted them.

        Returns:
            How many of them are answered by that.
        """
        stop = self.table.length
        answered = max(0, stop - max(self.wanted_from, stop - count))
        if self.draft:  # how many of these tokens are in the text is not known yet
            return answered
        self._count(stop, count)
        return answered

    def settle(self, held: int) -> None:
        """Of the draft that was computed, so many guesses are in the text now, and the others are forgotten."""
        count = 1 + held
        stop = self.table.length - len(self.draft) + held
        self.table.truncate(stop)
        self.draft = []
        self._count(stop, count)

    def _count(self, stop: int, count: int) -> None:
        """The `count` tokens before position `stop` are computed, and of the text."""
        self.wanted_from = max(self.wanted_from, stop)
        if not self.whole and stop // PAGE > (stop - count) // PAGE:
            self.table.publish(self._page_keys(stop), self.ids, self._kind)

    def _page_keys(self, length: int) -> list[bytes]:
        """Keys of the full pages of the first `length` tokens."""
        full = length // PAGE
        if full > len(self._keys):
            self._keys = prefix_keys(self.ids[: full * PAGE], self._keys, self._kind)
        return self._keys[:full]

    def _before(self, length: int) -> bytes:
        """The key of the first `length` tokens, which fill their pages."""
        return self._page_keys(length)[-1] if length else self._kind

    @property
    def _kind(self) -> bytes:
        """What pages are found by beside their tokens."""
        return (b"" if self.adapter < 0 else b"adapter %d" % self.adapter) + self.slot
