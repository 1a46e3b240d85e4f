"""States of sequences against the tokens that they stand for, whatever happens to the sequences in whatever order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kbit.graph.block_table import BlockTable
from kbit.graph.pages import PAGE, OutOfPagesError, PagePool
from kbit.graph.prefix_keys import prefix_keys
from kbit.graph.states import ShortConvolution, StateSpec, StateStore


class Nothing:
    """A store of pages without contents."""

    page_bytes = 0

    def __init__(self, count: int) -> None:
        self.count = count

    def resize(self, count: int) -> None:
        self.count = count

    def copy(self, source: int, target: int) -> None:
        pass


def digest(before: float, token: int) -> float:
    return (before * 31 + token + 1) % 65521


class Sequences(RuleBasedStateMachine):
    """A sequence's state is a digest of its tokens: that of the last token's slot, read, and written to another."""

    @initialize(slots=st.integers(2, 9))
    def start(self, slots: int) -> None:
        self.store = StateStore([StateSpec((1,), "float64")], slots)
        self.states = PagePool(self.store)
        self.pool = PagePool(Nothing(64), self.states)
        self.tables: list[tuple[BlockTable, list[int]]] = [(BlockTable(self.pool), [])]

    def _pick(self, data: st.DataObject) -> tuple[BlockTable, list[int]]:
        return self.tables[data.draw(st.integers(0, len(self.tables) - 1))]

    @rule(data=st.data(), count=st.integers(0, 70), kind=st.integers(0, 1), fails=st.booleans())
    def append(self, data: st.DataObject, count: int, kind: int, fails: bool) -> None:
        table, tokens = self._pick(data)
        try:
            table.reserve(count)
        except OutOfPagesError:
            return
        if count:
            value = 0.0 if table.state < 0 else self.store.arrays[0][table.state, 0]
            for _ in range(count):
                value = digest(value, kind)
            self.store.arrays[0][table.next_state, 0] = value
        if not fails:
            table.advance(count)
            tokens += [kind] * count

    @rule(data=st.data())
    def keep(self, data: st.DataObject) -> None:
        self._pick(data)[0].snapshot()

    @rule(data=st.data(), length=st.integers(0, 150))
    def go_back(self, data: st.DataObject, length: int) -> None:
        table, tokens = self._pick(data)
        kept = table.kept_before(length)
        assert kept <= length
        table.truncate(kept)
        del tokens[kept:]

    @rule(data=st.data(), length=st.integers(1, 150))
    def forget(self, data: st.DataObject, length: int) -> None:
        self._pick(data)[0].forget(length)

    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        table, tokens = self._pick(data)
        if len(self.tables) < 4:
            self.tables.append((table.fork(), list(tokens)))

    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        table, tokens = self._pick(data)
        table.publish(prefix_keys(tokens))
        table.release()
        tokens.clear()

    @rule(data=st.data(), kind=st.integers(0, 1))
    def find(self, data: st.DataObject, kind: int) -> None:
        table, tokens = self._pick(data)
        if not table.pages:
            found = table.match(prefix_keys([kind] * (2 * PAGE)))
            assert found % PAGE == 0
            tokens += [kind] * found

    @invariant()
    def states_are_those_of_the_tokens(self) -> None:
        for table, tokens in getattr(self, "tables", []):
            value = 0.0
            for token in tokens:
                value = digest(value, token)
            assert table.length == len(tokens)
            assert (0.0 if table.state < 0 else self.store.arrays[0][table.state, 0]) == value

    def teardown(self) -> None:
        for table, _ in getattr(self, "tables", []):
            table.release()
            table.release()
        if hasattr(self, "states"):
            assert self.states.available == self.states.count


TestSequences = Sequences.TestCase
TestSequences.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


def test_a_store_grows_and_keeps() -> None:
    store = StateStore([StateSpec((2, 3)), StateSpec((4,), "float16")], 1)
    store.arrays[0][0], store.arrays[1][0] = 1.5, 2.5
    store.resize(3)
    store.copy(0, 2)
    assert (store.count, store.page_bytes) == (3, 2 * 3 * 4 + 4 * 2)
    assert np.all(store.arrays[0][[0, 2]] == 1.5)
    assert np.all(store.arrays[1][[0, 2]] == 2.5)


def test_a_convolution_without_a_past() -> None:
    with pytest.raises(ValueError, match="over one token has no state"):
        ShortConvolution(0, 1, 8)
