"""Which of many texts begins most like another: the pages that may follow one another, sorted by their tokens."""

from __future__ import annotations

from bisect import bisect_left

_WIDTH = 8  # bytes of a token


class Beginnings:
    """Texts of some tokens each, under the key of what is before them, and the page that holds each.

    Texts after one key are kept in the order of their bytes. So the one that shares most with another text is next to
    where that would be, however many there are.
    """

    def __init__(self) -> None:
        self._after: dict[bytes, list[tuple[bytes, int]]] = {}
        self._places: dict[int, tuple[bytes, bytes]] = {}  # of pages: what is before them, and their own tokens

    def add(self, before: bytes, tokens: bytes, page: int) -> None:
        """A page that holds these tokens after those of a key. It has none yet."""
        found = self._after.setdefault(before, [])
        found.insert(bisect_left(found, (tokens, page)), (tokens, page))
        self._places[page] = before, tokens

    def remove(self, page: int) -> None:
        """Forgets a page, if it is known."""
        if page in self._places:
            before, tokens = self._places.pop(page)
            found = self._after[before]
            del found[bisect_left(found, (tokens, page))]
            if not found:
                del self._after[before]

    def most_alike(self, before: bytes, tokens: bytes) -> tuple[int, int] | None:
        """(the page after this key that has most tokens in common with these, how many), or None where none has any."""
        found = self._after.get(before, [])
        place = bisect_left(found, (tokens, -1))
        best = max(((_shared(text, tokens), page) for text, page in found[max(0, place - 1) : place + 1]), default=None)
        return None if best is None or not best[0] else (best[1], best[0])


def _shared(one: bytes, other: bytes) -> int:
    """Tokens that two texts have in common from their beginning on."""
    count = min(len(one), len(other)) // _WIDTH
    for index in range(count):
        part = slice(index * _WIDTH, (index + 1) * _WIDTH)
        if one[part] != other[part]:
            return index
    return count
