"""Pages of a key/value cache: who owns which, and which sequences share one.

Memory for keys and values comes in pages of PAGE tokens. A page has one id, under which every layer keeps its part. A
sequence has a block table: the ids of its pages, in order. So sequences grow without being moved, and those with a
common beginning have pages in common, which are counted and copied only when one of them is about to write into it.
The page in which they come to differ is copied at once, and shared as far as it goes (`BlockTable.match_part`).

A model whose layers have states of fixed size (`kbit.graph.states`) keeps these in slots of a second pool, likewise
counted. A sequence can go back only to where its state was kept (`BlockTable.snapshot`), or to its start.

Nothing here knows how keys and values are stored: a backend keeps the bytes (`PageStore`), this keeps the books.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b
from typing import Protocol, TypeAlias

import numpy as np

from kbit.graph.beginnings import Beginnings
from kbit.host.errors import KbitError, UsageError

PAGE = 64  # tokens

# A number that all layers have, or one for each.
PerLayer: TypeAlias = "int | Sequence[int]"


def of_layers(number: PerLayer, layers: int) -> tuple[int, ...]:
    """The number of each of so many layers.

    Raises:
        ValueError: there are as many numbers as other layers.
    """
    numbers = (number,) * layers if isinstance(number, int) else tuple(number)
    if len(numbers) != layers:
        raise ValueError(f"{len(numbers)} numbers are not those of {layers} layers")
    return numbers


def pages_for(tokens: int) -> int:
    """Pages that hold so many tokens of one sequence."""
    return -(-tokens // PAGE)


class OutOfPagesError(KbitError):
    """Every page is in use."""


class PageStore(Protocol):
    """A backend's memory for pages 0 .. count - 1."""

    @property
    def count(self) -> int:
        """Pages there is memory for."""

    @property
    def page_bytes(self) -> int:
        """Bytes of a page: keys and values of PAGE tokens in all layers."""

    def resize(self, count: int) -> None:
        """Memory for at least `count` pages; those there are keep their contents.

        Raises:
            MemoryError, RuntimeError: there is none.
        """

    def copy(self, source: int, target: int) -> None:
        """Makes the contents of page `target` those of `source`."""


class PagePool:
    """The pages of one store, each free, used by some block tables, or kept for its contents.

    A page whose tokens are known can be published under their key (`prefix_keys`). When its last user lets go of it, it
    is kept, and found again by that key, until no other page is free: then the one that was let go of first is taken.
    It is also found by the first of its tokens (`find_part`), where its own are given.

    Args:
        store: the memory.
        states: slots of the sequences' states of fixed size, each a page of its own pool; None: they have none.
    """

    def __init__(self, store: PageStore, states: PagePool | None = None) -> None:
        self.store = store
        self.states = states
        self._uses = [0] * store.count
        self._free = list(range(store.count - 1, -1, -1))  # the next to be taken is the last
        self._keys: dict[int, bytes] = {}  # of published pages
        self._published: dict[bytes, int] = {}
        self._contents: dict[int, bytes] = {}  # the tokens of published pages, where they were given
        self._beginnings = Beginnings()  # of those
        self._kept: OrderedDict[int, None] = OrderedDict()  # published pages nobody uses, the oldest first

    @property
    def count(self) -> int:
        """All pages."""
        return len(self._uses)

    @property
    def available(self) -> int:
        """Pages that can be taken now."""
        return len(self._free) + len(self._kept)

    @property
    def nbytes(self) -> int:
        """Bytes of all pages, and of the slots of states."""
        states = 0 if self.states is None else self.states.nbytes
        return self.store.count * self.store.page_bytes + states

    def uses(self, page: int) -> int:
        """Block tables that have a page."""
        return self._uses[page]

    def ensure(self, count: int) -> None:
        """At least `count` pages in all."""
        if count > len(self._uses):
            self.store.resize(count)
            self._free[:0] = range(self.store.count - 1, len(self._uses) - 1, -1)
            self._uses += [0] * (self.store.count - len(self._uses))

    def spare(self, count: int) -> None:
        """At least `count` pages that can be taken."""
        if count > self.available:
            self.ensure(self.count + count - self.available)

    def take(self) -> int:
        """A page for one user, contents undefined.

        Raises:
            OutOfPagesError: all are in use.
        """
        if self._free:
            page = self._free.pop()
        elif self._kept:
            page, _ = self._kept.popitem(last=False)
            self._withdraw(page)
        else:
            raise OutOfPagesError(f"all {self.count} pages of the cache are in use")
        self._uses[page] = 1
        return page

    def share(self, page: int) -> int:
        """The same page for one user more."""
        if self._uses[page] == 0:
            del self._kept[page]
        self._uses[page] += 1
        return page

    def release(self, page: int) -> None:
        """One user less."""
        self._uses[page] -= 1
        if self._uses[page] == 0:
            if page in self._keys:
                self._kept[page] = None
            else:
                self._free.append(page)

    def writable(self, page: int) -> int:
        """The page itself, or a copy where others use it too; what is written next is not what a key promises."""
        if self._uses[page] > 1:
            copy = self.take()
            self.store.copy(page, copy)
            self._uses[page] -= 1
            return copy
        if page in self._keys:
            self._withdraw(page)
        return page

    def publish(self, page: int, key: bytes, tokens: bytes | None = None, before: bytes = b"") -> None:
        """Lets a page be found by the key of its tokens, and by these themselves, where they are given. Where the key
        has a page already, that one stays.

        Args:
            page: nobody writes to it but who asks for it with `writable`.
            key: `prefix_keys`, or of a page that is filled in part, `part_key`.
            tokens: those that are in it.
            before: the key of the page before it, or what the keys of the text began with (`prefix_keys`).
        """
        if page not in self._keys and key not in self._published:
            self._keys[page] = key
            self._published[key] = page
            if tokens is not None:
                self._contents[page] = tokens
                self._beginnings.add(before, tokens, page)

    def find(self, key: bytes, tokens: bytes | None = None) -> int | None:
        """The page of a key, or None; also where it holds other tokens than these, of the same key by chance."""
        page = self._published.get(key)
        known = None if page is None else self._contents.get(page)
        return None if tokens is not None and known is not None and known != tokens else page

    def find_part(self, before: bytes, tokens: bytes) -> tuple[int, int] | None:
        """(the page after the key `before` that begins most like these tokens, how many they share), or None."""
        return self._beginnings.most_alike(before, tokens)

    def _withdraw(self, page: int) -> None:
        del self._published[self._keys.pop(page)]
        self._contents.pop(page, None)
        self._beginnings.remove(page)


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
            page = self._pool.find(key, None if tokens is None else _page_tokens(tokens, index))
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
        part = None if self._pool.states is not None else self._pool.find_part(before, _page_tokens(tokens, 0))
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
                content = None if tokens is None else _page_tokens(tokens, index)
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
            content = _page_tokens(tokens, 0)
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


def _page_tokens(tokens: Sequence[int], index: int) -> bytes:
    """The tokens of a page of a text, as bytes."""
    return np.asarray(tokens[index * PAGE : (index + 1) * PAGE], dtype=np.int64).tobytes()


def prefix_keys(tokens: Sequence[int], known: Sequence[bytes] = (), kind: bytes = b"") -> list[bytes]:
    """A key for each full page of a text: equal exactly where the page and everything before it is equal.

    Args:
        tokens: the text.
        known: its first keys, where they were made before.
        kind: what else the keys and values of a text depend on; others have other keys.
    """
    keys = list(known)
    key = keys[-1] if keys else kind
    for start in range(PAGE * len(keys), len(tokens) - PAGE + 1, PAGE):
        key = part_key(key, _page_tokens(tokens, start // PAGE))
        keys.append(key)
    return keys


def part_key(before: bytes, tokens: bytes) -> bytes:
    """The key of a page that holds these tokens, full or not, after those of the key `before`."""
    return blake2b(before + tokens, digest_size=16).digest()
