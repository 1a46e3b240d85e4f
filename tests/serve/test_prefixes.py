"""Who has seen the beginning of a prompt before."""

from __future__ import annotations

import json

import pytest

from kbit.serve.prefixes import PrefixTable, beginning


def test_the_longest_beginning_of_whole_blocks() -> None:
    table = PrefixTable[str](block=4)
    table.remember("abcdefghij", "one")
    table.remember("abcdEFGH", "two")
    assert table.longest("abcdefghXX", {"one", "two"}) == (8, ["one"])
    assert table.longest("abcdEFGHij", {"one", "two"}) == (8, ["two"])
    assert table.longest("abcd", {"one", "two"}) == (4, ["one", "two"])
    assert table.longest("abcdefgh", {"two"}) == (4, ["two"])
    assert table.longest("abc", {"one"}) == (0, [])  # no whole block
    assert table.longest("efghabcd", {"one"}) == (0, [])  # seen, but after something else


def test_holders_go_and_old_beginnings_are_forgotten() -> None:
    table = PrefixTable[int](most=3, block=2)
    table.remember("aabb", 1)
    table.remember("aabb", 2)
    table.forget(1)
    assert table.longest("aabb", {1, 2}) == (4, [2])
    table.remember("ccddee", 3)  # three blocks: all that there is room for
    assert table.longest("aabb", {1, 2, 3}) == (0, [])
    assert table.longest("ccddee", {3}) == (6, [3])
    table.forget(3)
    assert table.longest("cc", {3}) == (0, [])


def test_half_a_character_is_a_block_like_any_other() -> None:
    table = PrefixTable[int](block=1)
    table.remember("\ud83d", 1)
    assert table.longest("\ud83d\ude00", {1}) == (1, [1])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"prompt": "Once upon a time", "seed": 1}, {"seed": 2, "prompt": "Once upon a time", "stream": True}),
        (
            {"messages": [{"role": "user", "content": "Hi"}], "model": "m"},
            {"model": "m", "temperature": 0, "messages": [{"role": "user", "content": "Hi"}]},
        ),
    ],
)
def test_how_to_write_is_no_part_of_a_beginning(one: dict[str, object], other: dict[str, object]) -> None:
    assert beginning(json.dumps(one).encode()) == beginning(json.dumps(other).encode()) != ""


def test_a_conversation_begins_as_its_earlier_turns() -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    earlier, later = ({"system": "Be kind", "messages": turns[:n]} for n in (1, 2))
    assert beginning(json.dumps(later).encode()).startswith(beginning(json.dumps(earlier).encode())[:-1])


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"3", b"\xff", b"{}", b'{"stream": true}'])
def test_bodies_that_tell_nothing(body: bytes) -> None:
    assert beginning(body) == ""
