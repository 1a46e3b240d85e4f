"""Pages: block tables against plain lists of tokens, whatever happens to them in whatever order."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kbit.graph.block_table import BlockTable
from kbit.graph.pages import PAGE, OutOfPagesError, PagePool, pages_for
from kbit.graph.prefix_keys import prefix_keys


class Memory:
    """A store of token ids, PAGE to a page."""

    def __init__(self, count: int) -> None:
        self.slots = [[-1] * PAGE for _ in range(count)]
        self.copies = 0

    @property
    def count(self) -> int:
        return len(self.slots)

    @property
    def page_bytes(self) -> int:
        return 8 * PAGE

    def resize(self, count: int) -> None:
        self.slots += [[-1] * PAGE for _ in range(count - len(self.slots))]

    def copy(self, source: int, target: int) -> None:
        self.slots[target] = list(self.slots[source])
        self.copies += 1


def write(memory: Memory, table: BlockTable, tokens: list[int]) -> None:
    table.reserve(len(tokens))
    for position, token in enumerate(tokens, table.length):
        memory.slots[table.pages[position // PAGE]][position % PAGE] = token
    table.advance(len(tokens))


def read(memory: Memory, table: BlockTable) -> list[int]:
    return [memory.slots[table.pages[at // PAGE]][at % PAGE] for at in range(table.length)]


class Tables(RuleBasedStateMachine):
    """Sequences that grow, shrink, fork, end, and find each other's beginnings, each with the list it stands for."""

    @initialize(count=st.integers(3, 12))
    def start(self, count: int) -> None:
        self.memory = Memory(count)
        self.pool = PagePool(self.memory)
        self.tables: list[tuple[BlockTable, list[int]]] = [(BlockTable(self.pool), [])]

    def _pick(self, data: st.DataObject) -> tuple[BlockTable, list[int]]:
        return self.tables[data.draw(st.integers(0, len(self.tables) - 1))]

    @rule(data=st.data(), count=st.integers(0, 2 * PAGE + 3), kind=st.integers(0, 1))
    def append(self, data: st.DataObject, count: int, kind: int) -> None:
        table, text = self._pick(data)
        tokens = [kind + 2 * (len(text) + i) for i in range(count)]  # few texts, so that beginnings are met again
        try:
            write(self.memory, table, tokens)
        except OutOfPagesError:
            return
        text += tokens

    @rule(data=st.data(), length=st.integers(0, 4 * PAGE))
    def truncate(self, data: st.DataObject, length: int) -> None:
        table, text = self._pick(data)
        table.truncate(length)
        del text[length:]

    @precondition(lambda self: len(self.tables) < 5)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        table, text = self._pick(data)
        self.tables.append((table.fork(), list(text)))

    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        table, text = self._pick(data)
        keys, full = prefix_keys(text), len(text) // PAGE * PAGE
        table.publish(keys, text)
        table.publish_part(keys[-1] if keys else b"", text[full:])

    @rule(data=st.data())
    def begin_again(self, data: st.DataObject) -> None:
        table, text = self._pick(data)
        table.release()
        keys = prefix_keys(text)
        found = table.match(keys, text)
        found += table.match_part(keys[found // PAGE - 1] if found else b"", text[found : found + PAGE])
        del text[found:]

    @rule(count=st.integers(1, 14))
    def ensure(self, count: int) -> None:
        self.pool.ensure(count)
        assert self.pool.count >= count

    @invariant()
    def every_table_has_its_tokens(self) -> None:
        for table, text in self.tables:
            assert read(self.memory, table) == text

    @invariant()
    def every_page_is_counted(self) -> None:
        used = [page for table, _ in self.tables for page in table.pages]
        for page in range(self.pool.count):
            assert self.pool.uses(page) == used.count(page)
        assert self.pool.available == self.pool.count - len(set(used))


TestTables = Tables.TestCase
TestTables.settings = settings(max_examples=60, stateful_step_count=30)


def test_a_common_page_is_copied_when_it_is_written_to() -> None:
    memory = Memory(8)
    pool = PagePool(memory)
    table = BlockTable(pool)
    write(memory, table, list(range(PAGE + 5)))
    other = table.fork()
    assert (other.pages, pool.available) == (table.pages, 6)
    assert (table.missing(1), table.missing(PAGE)) == (1, 2)
    write(memory, other, [-7])
    assert other.pages[0] == table.pages[0]
    assert other.pages[1] != table.pages[1]
    assert memory.copies == 1
    write(memory, table, [-8])  # by now alone on its page
    assert memory.copies == 1
    assert (read(memory, table)[-1], read(memory, other)[-1]) == (-8, -7)


def test_published_pages_wait_until_they_are_needed() -> None:
    memory = Memory(3)
    pool = PagePool(memory)
    table = BlockTable(pool)
    text = list(range(3 * PAGE))
    write(memory, table, text)
    keys = prefix_keys(text)
    table.publish(keys)
    table.release()
    assert pool.available == 3
    again = BlockTable(pool)
    assert again.match(keys[:2]) == 2 * PAGE
    assert read(memory, again) == text[: 2 * PAGE]
    write(memory, again, [5])  # takes the only page that is free: the third of the text
    third = BlockTable(pool)
    assert third.match(keys) == 2 * PAGE
    with pytest.raises(ValueError, match="empty"):
        third.match(keys)


def test_a_page_is_shared_as_far_as_its_tokens_are() -> None:
    memory = Memory(4)
    pool = PagePool(memory)
    text = list(range(PAGE + 40))
    keys = prefix_keys(text)
    first = BlockTable(pool)
    write(memory, first, text)
    first.publish(keys, text)
    first.publish_part(keys[0], text[PAGE:])
    first.release()
    second, third, fourth = (BlockTable(pool) for _ in range(3))
    assert second.match(keys, text) == PAGE
    assert second.match_part(keys[0], [*text[PAGE : PAGE + 7], -1]) == 7
    write(memory, second, [-1])
    assert read(memory, second) == [*text[: PAGE + 7], -1]
    assert third.match_part(b"", [-1]) == 0
    assert third.match_part(b"another adapter", text[:PAGE]) == 0
    assert third.match_part(b"", text[:9]) == 9
    assert read(memory, third) == text[:9]
    with pytest.raises(ValueError, match="full pages"):
        third.match_part(b"", text[:9])
    assert fourth.match(keys, text) == PAGE
    assert pool.available == 1  # that which is to be copied
    copies = memory.copies
    assert fourth.match_part(keys[0], text[PAGE:]) == 40
    assert memory.copies == copies
    assert read(memory, fourth) == text
    assert pool.find_part(keys[0], b"".join(each.to_bytes(8, "little") for each in text[PAGE:])) is None
    third.release()
    third.match_part(b"", text[:9])
    assert pool.available == 0
    assert BlockTable(pool).match_part(b"", text[:9]) == 0  # the page has users, and there is none for a copy


def test_a_key_that_two_texts_have_by_chance_is_no_match() -> None:
    memory = Memory(8)
    pool = PagePool(memory)
    table = BlockTable(pool)
    text = list(range(2 * PAGE))
    write(memory, table, text)
    keys = prefix_keys(text)
    table.publish(keys, text)
    table.release()
    same, other = BlockTable(pool), BlockTable(pool)
    assert other.match(keys, [*text[:-1], 5]) == PAGE
    assert other.pages == [pool.find(keys[0])]
    assert same.match(keys, text) == 2 * PAGE
    other.release()
    assert other.match(keys, [5, *text[1:]]) == 0


def test_no_page_is_taken_where_not_all_can_be() -> None:
    pool = PagePool(Memory(3))
    table = BlockTable(pool)
    with pytest.raises(OutOfPagesError, match="4 pages of the KV cache, of which 3 are free"):
        table.reserve(3 * PAGE + 1)
    assert (table.pages, pool.available) == ([], 3)
    table.reserve(3 * PAGE)
    with pytest.raises(OutOfPagesError, match="all 3 pages"):
        pool.take()


@given(st.lists(st.integers(0, 3), max_size=3 * PAGE), st.lists(st.integers(0, 3), max_size=3 * PAGE))
def test_keys_are_equal_where_beginnings_are(one: list[int], other: list[int]) -> None:
    keys, others = prefix_keys(one), prefix_keys(other)
    assert len(keys) == len(one) // PAGE
    for index, (a, b) in enumerate(zip(keys, others, strict=False), 1):
        assert (a == b) == (one[: index * PAGE] == other[: index * PAGE])


def test_pages_for() -> None:
    assert [pages_for(tokens) for tokens in (0, 1, PAGE, PAGE + 1)] == [0, 1, 1, 2]
