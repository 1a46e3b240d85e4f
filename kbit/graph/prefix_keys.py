"""Keys by which pages are found again: each stands for all tokens up to its own."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

from kbit.graph.pages import PAGE


def page_tokens(tokens: Sequence[int], index: int) -> bytes:
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
        key = part_key(key, page_tokens(tokens, start // PAGE))
        keys.append(key)
    return keys


def part_key(before: bytes, tokens: bytes) -> bytes:
    """The key of a page that holds these tokens, full or not, after those of the key `before`."""
    return blake2b(before + tokens, digest_size=16).digest()
