"""Which text begins most like another: against a look at all of them."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kbit.graph.beginnings import Beginnings

TEXTS = st.lists(st.sampled_from([0, 1, 255, 256, 70000]), max_size=6)


def packed(tokens: list[int]) -> bytes:
    return np.asarray(tokens, np.int64).tobytes()


def common(one: list[int], other: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


@given(st.lists(st.tuples(st.sampled_from([b"a", b"b"]), TEXTS), max_size=12), st.data())
def test_the_most_alike_is_found(texts: list[tuple[bytes, list[int]]], data: st.DataObject) -> None:
    found = Beginnings()
    for page, (before, tokens) in enumerate(texts):
        found.add(before, packed(tokens), page)
    removed = data.draw(st.sets(st.integers(0, len(texts))))
    for page in removed:
        found.remove(page)
    wanted = data.draw(TEXTS)
    shared = {
        page: common(tokens, wanted)
        for page, (before, tokens) in enumerate(texts)
        if before == b"a" and page not in removed
    }
    best = found.most_alike(b"a", packed(wanted))
    if best is None:
        assert not any(shared.values())
    else:
        assert best[1] == max(shared.values()) == shared[best[0]] > 0
