"""Who has seen the beginning of a prompt before: for whoever shares requests out among several servers, each of which
keeps what it has computed of its prompts."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Collection, Hashable, Iterator
from typing import Generic, TypeVar

Holder = TypeVar("Holder", bound=Hashable)

# Characters that are compared at once: about a page of 64 tokens.
BLOCK = 256
# What a body has before what its model reads last, in the order in which templates write it.
_IN_ORDER = ("model", "tools", "system", "instructions", "messages", "input", "input_prefix", "prompt", "query")


def beginning(body: bytes) -> str:
    """What a request's prompt begins with, as far as its body tells; "" where it tells nothing.

    Args:
        body: of any of the server's routes.
    """
    try:
        fields = json.loads(body)
    except ValueError:
        return ""
    if not isinstance(fields, dict):
        return ""
    return "".join(json.dumps(fields[name], ensure_ascii=False) for name in _IN_ORDER if name in fields)


class PrefixTable(Generic[Holder]):
    """The beginnings that holders have seen, in whole blocks, the last used ones.

    Args:
        most: blocks to remember.
        block: characters of one.
    """

    def __init__(self, most: int = 1 << 16, block: int = BLOCK) -> None:
        self._most, self._block = most, block
        self._holders: OrderedDict[bytes, dict[Holder, None]] = OrderedDict()

    def remember(self, text: str, holder: Holder) -> None:
        """This holder has seen this text."""
        for key in self._keys(text):
            self._holders.setdefault(key, {})[holder] = None
            self._holders.move_to_end(key)
        while len(self._holders) > self._most:
            self._holders.popitem(last=False)

    def forget(self, holder: Holder) -> None:
        """This holder is gone, and what it kept with it."""
        for key in [key for key, holders in self._holders.items() if holder in holders]:
            del self._holders[key][holder]
            if not self._holders[key]:
                del self._holders[key]

    def longest(self, text: str, among: Collection[Holder]) -> tuple[int, list[Holder]]:
        """Characters of the longest beginning that any of these holders has seen, and who has; (0, []): none."""
        length, found = 0, list[Holder]()
        for key in self._keys(text):
            holders = [holder for holder in self._holders.get(key, ()) if holder in among]
            if not holders:
                break
            length, found = length + self._block, holders
        return length, found

    def _keys(self, text: str) -> Iterator[bytes]:
        """Of every whole block a key that stands for all before it, too."""
        key = b""
        for start in range(0, len(text) - self._block + 1, self._block):
            block = text[start : start + self._block].encode("utf-8", "surrogatepass")
            key = hashlib.blake2b(key + block, digest_size=16).digest()
            yield key
