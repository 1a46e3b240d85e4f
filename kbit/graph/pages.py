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
from typing import Protocol, TypeAlias

from kbit.graph.beginnings import Beginnings
from kbit.host.errors import KbitError

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
