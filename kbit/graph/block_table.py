"""The pages of one sequence: it grows, goes back, and finds those that others with the same beginning have left."""

from __future__ import annotations

from collections.abc import Sequence

from kbit.graph.pages import PAGE, OutOfPagesError, PagePool, pages_for
from kbit.graph.prefix_keys import page_tokens, part_key
from kbit.host.errors import UsageError


class BlockTable:
    """The pages of one sequence, and how many tokens are in them.

    Room is made before tokens are written (`reserve`), and they count once they are (`advance`): what fails in between
    leaves the sequence as it was.

    Args:
        pool: where pages come from.

    Attributes:
        pages: ids in order, room made for later tokens included. Not to be written to.
        length: tokens.
        version: changes with `pages`.
        state: the slot of its states, or -1: it is at its start, or the pool has no states.
        next_state: the slot where a pass leaves the states after the tokens that room was made for, or -1.
    """

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self.pages: list[int] = []
        self.length = 0
        self.version = 0
        self.state = self.next_state = -1
        self._snapshots: dict[int, int] = {}  # slots by position
        self._own_from = 0  # pages from this index on are known to be this table's alone, and not published

    def missing(self, tokens: int) -> int:
        """Pages that `reserve` would take."""
        first, stop = self._span(tokens)
        return max(0, stop - len(self.pages)) + sum(self._pool.uses(page) > 1 for page in self.pages[first:stop])

    def reserve(self, tokens: int) -> None:
        """Makes room for the next `tokens` tokens, in pages that nobody else has.

        Raises:
            OutOfPagesError: there are not enough; nothing changed but that shared pages may have been copied.
        """
        first, stop = self._span(tokens)
        if tokens and self._pool.states is not None and self.next_state < 0:
            self.next_state = self._pool.states.take()
        if tokens == 0 or (first >= self._own_from and stop <= len(self.pages)):
            return
        if self.missing(tokens) > self._pool.available:
            raise OutOfPagesError(
                f"{tokens} more tokens need {self.missing(tokens)} pages of the KV cache, of which "
                f"{self._pool.available} are free"
            )
        for index in range(first, min(stop, len(self.pages))):
            self.pages[index] = self._pool.writable(self.pages[index])
        while len(self.pages) < stop:
            self.pages.append(self._pool.take())
        self._own_from = min(self._own_from, first)
        self.version += 1

    def advance(self, tokens: int) -> None:
        """Counts tokens that were written where `reserve` made room."""
        self.length += tokens
        if tokens and self.next_state >= 0:
            self._go_to(self.next_state)
            self.next_state = -1

    def snapshot(self) -> None:
        """Keeps the states as they are, to go back to with `truncate`, until `forget`. Without states, nothing."""
        if self.state >= 0 and self.length not in self._snapshots:
            self._snapshots[self.length] = self._states.share(self.state)

    def forget(self, length: int) -> None:
        """Gives back what `snapshot` kept when the sequence had so many tokens, if it did."""
        if length in self._snapshots:
            self._states.release(self._snapshots.pop(length))

    def kept_before(self, length: int) -> int:
        """How many tokens `truncate` can leave, `length` at most: without states, that; else where states were kept."""
        if self._pool.states is None or length >= self.length:
            return min(length, self.length)
        return max((kept for kept in self._snapshots if kept <= length), default=0)

    def check_kept(self, length: int) -> None:
        """
        Raises:
            UsageError: `truncate` to this length would need states that were not kept.
        """
        kept = self.kept_before(length)
        if kept != min(length, self.length):
            raise UsageError(
                f"the state of a sequence of {self.length} tokens after {length} of them was not kept: it can go back "
                f"to {kept}"
            )

    def truncate(self, length: int) -> None:
        """Forgets every token from position `length` on, and gives back the pages behind it.

        Raises:
            UsageError: the states there were not kept; nothing changed.
        """
        self.check_kept(length)
        if length < self.length:
            if self._pool.states is not None:
                self._go_to(self._states.share(self._snapshots[length]) if length else -1)
                for later in [kept for kept in self._snapshots if kept > length]:
                    self.forget(later)
            self.length = length
        if self.next_state >= 0:
            self._states.release(self.next_state)
            self.next_state = -1
        self._release_from(pages_for(self.length))

    def fork(self) -> BlockTable:
        """Another sequence with the same tokens, on the same pages."""
        other = BlockTable(self._pool)
        other.pages = [self._pool.share(page) for page in self.pages[: pages_for(self.length)]]
        other.length = self.length
        if self.state >= 0:
            other.state = self._states.share(self.state)
        other._snapshots = {length: self._states.share(slot) for length, slot in self._snapshots.items()}
        other._own_from = self._own_from = len(other.pages)
        return other

    def release(self) -> None:
        """Gives back all pages; the table is empty then."""
        self.truncate(0)

    def match(self, keys: Sequence[bytes], tokens: Sequence[int] | None = None) -> int:
        """Takes over published pages for the beginning of an empty sequence.

        Args:
            keys: of its full pages (`prefix_keys`).
            tokens: of the sequence; they are compared with those of the pages, where they are given.

        Returns:
            How many tokens are in the sequence by that.

        Raises:
            ValueError: the table is not empty.
        """
        if self.pages:
            raise ValueError("only an empty sequence can begin with pages of another")
        for index, key in enumerate(keys):
            page = self._pool.find(key, None if tokens is None else page_tokens(tokens, index))
            if page is None:
                break
            self.pages.append(self._pool.share(page))
        if self._pool.states is not None:
            self._match_state(keys[: len(self.pages)])
        self.length = PAGE * len(self.pages)
        self._own_from = len(self.pages)
        self.version += 1
        return self.length

    def match_part(self, before: bytes, tokens: Sequence[int]) -> int:
        """After `match`: begins one page more with what a published one holds of the next tokens.

        That page is copied, as both texts go on in their own ways; where there is no page for the copy, it is itself
        taken over, if nobody uses it. Nothing is shared where sequences have states, which are not kept within pages.

        Args:
            before: the key of the last page there is, or what the keys of the text begin with.
            tokens: that come next.

        Returns:
            How many more tokens are in the sequence by that, PAGE at most.

        Raises:
            ValueError: there is a page already that is not full.
        """
        if self.length != PAGE * len(self.pages):
            raise ValueError("only a sequence of full pages can go on with a part of another's")
        part = None if self._pool.states is not None else self._pool.find_part(before, page_tokens(tokens, 0))
        if part is None:
            return 0
        source, shared = part
        self._pool.share(source)  # or it might be the one that is taken
        if self._pool.available:
            page = self._pool.take()
            self._pool.store.copy(source, page)
            self._pool.release(source)
        elif self._pool.uses(source) == 1:
            page = self._pool.writable(source)
        else:
            self._pool.release(source)
            return 0
        self.pages.append(page)
        self.length += shared
        self.version += 1
        return shared

    def publish(self, keys: Sequence[bytes], tokens: Sequence[int] | None = None, kind: bytes = b"") -> None:
        """Lets other sequences find this one's full pages, and the states kept at the ends of such; `keys` and `tokens`
        as for `match`, `kind` as for `prefix_keys`."""
        full = self.length // PAGE
        for index, (page, key) in enumerate(zip(self.pages[:full], keys, strict=False)):
            if self._pool.find(key) is None:
                content = None if tokens is None else page_tokens(tokens, index)
                self._pool.publish(page, key, content, keys[index - 1] if index else kind)
        for length, slot in self._snapshots.items():
            if length % PAGE == 0 and 0 < length // PAGE <= len(keys):
                self._states.publish(slot, keys[length // PAGE - 1])
        self._own_from = max(self._own_from, min(full, len(keys)))

    def publish_part(self, before: bytes, tokens: Sequence[int]) -> None:
        """Lets other sequences find the last page, which is filled in part.

        Args:
            before: as for `match_part`.
            tokens: in that page.
        """
        index = self.length // PAGE
        if tokens and self._pool.states is None:
            content = page_tokens(tokens, 0)
            self._pool.publish(self.pages[index], part_key(before, content), content, before)
            self._own_from = max(self._own_from, index + 1)

    @property
    def _states(self) -> PagePool:
        assert self._pool.states is not None
        return self._pool.states

    def _go_to(self, slot: int) -> None:
        """Other states, of which this table has a use already, or -1."""
        if self.state >= 0:
            self._states.release(self.state)
        self.state = slot

    def _match_state(self, keys: Sequence[bytes]) -> None:
        """Takes over the last published states of a beginning, and gives back the pages behind them."""
        for count in range(len(keys), 0, -1):
            slot = self._states.find(keys[count - 1])
            if slot is not None:
                self._go_to(self._states.share(slot))
                self._release_from(count)
                return
        self._release_from(0)

    def _span(self, tokens: int) -> tuple[int, int]:
        """[first, stop) of the pages into which the next tokens go."""
        return self.length // PAGE, pages_for(self.length + tokens)

    def _release_from(self, index: int) -> None:
        if index < len(self.pages):
            for page in reversed(self.pages[index:]):  # the end of a text is taken first, or its rest is not found
                self._pool.release(page)
            del self.pages[index:]
            self._own_from = min(self._own_from, index)
            self.version += 1
