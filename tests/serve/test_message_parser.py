"""Messages read from text as it comes: the same wherever it is cut."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kbit.serve.message_parser import Called, MessageParser, Part, Said, joined, thinks, tool_format
from kbit.serve.tool_calls import Arguments, CallBegun


def read(pieces: list[str], tools: Any = None, **options: Any) -> tuple[str, str, list[Called]]:
    """(thought, text, calls) of an answer in pieces."""
    parser = MessageParser(tools, ("find", "add"), **options)
    parts: list[Part] = [part for piece in pieces for part in parser.push(piece)]
    parts += parser.finish()
    assert parser.finish() == []
    assert all(part.text for part in parts if isinstance(part, Said))
    thought = "".join(part.text for part in parts if isinstance(part, Said) and part.thought)
    text = "".join(part.text for part in parts if isinstance(part, Said) and not part.thought)
    return thought, text, [part for part in joined(parts) if isinstance(part, Called)]


def call(name: str = "find", **arguments: Any) -> str:
    return json.dumps({"name": name, "arguments": arguments})


FIND = Called("find", '{"what": "x"}')
CASES = [
    ("hermes", "plain text", {}, ("", "plain text", [])),
    ("hermes", f"Sure.\n<tool_call>\n{call(what='x')}\n</tool_call>", {}, ("", "Sure.", [FIND])),
    (
        "hermes",
        f"<tool_call>{call(what='</tool_call>}{')}</tool_call>\n<tool_call>{call('add', a=[1, {'b': 2}])}</tool_call>\n",
        {},
        ("", "", [Called("find", '{"what": "</tool_call>}{"}'), Called("add", '{"a": [1, {"b": 2}]}')]),
    ),
    ("hermes", f"<tool_call>{call(what='x')}", {}, ("", "", [FIND])),
    ("hermes", f"<tool_call>{call(what='x')}\n</tool", {}, ("", "", [FIND])),
    ("hermes", "<tool_call>not json</tool_call> after", {}, ("", "<tool_call>not json</tool_call> after", [])),
    ("hermes", '<tool_call>{"name": "find", "arguments": {"what": "', {}, ("", "", [Called("find", '{"what": "')])),
    ("hermes", '<tool_call>{"arguments": {"what": "x"}, "name": "find"}</tool_call>', {}, ("", "", [FIND])),
    (
        "hermes",
        '<tool_call>{"name": "find", "arguments": {"what": "x"}, "id": "}"}</tool_call>z',
        {},
        ("", "z", [FIND]),
    ),
    ("hermes", f"<tool_call>[{call(what='x')}, {call('add')}]</tool_call>", {}, ("", "", [FIND, Called("add", "{}")])),
    ("hermes", f"<tool_call>{call(what='x')} and so", {}, ("", "and so", [FIND])),
    ("hermes", '<tool_call>{"name": "fi', {}, ("", '<tool_call>{"name": "fi', [])),
    ("hermes", f"<tool_call>{call('other')}</tool_call>", {}, ("", f"<tool_call>{call('other')}</tool_call>", [])),
    ("hermes", "a < b <tool", {}, ("", "a < b <tool", [])),
    (
        "hermes",
        f"<think>\nlet me see </think>\n\nYes <tool_call>{call(what='x')}</tool_call>",
        {"reasoning": True},
        ("\nlet me see", "Yes", [FIND]),
    ),
    (None, "<think>a</think>b", {"reasoning": True}, ("a", "b", [])),
    (None, "<think>a</think>b", {}, ("", "<think>a</think>b", [])),
    (None, "a</think>\nb <think>c", {"thinking": True}, ("a", "b <think>c", [])),
    (None, "never closed </thi", {"thinking": True}, ("never closed </thi", "", [])),
    (None, " leading", {"reasoning": True}, ("", " leading", [])),
    ("mistral", f"[TOOL_CALLS][{call(what='x')}, {call('add')}]", {}, ("", "", [FIND, Called("add", "{}")])),
    ("mistral", '[TOOL_CALLS]find[ARGS]{"what": "x"}', {}, ("", "", [FIND])),
    (
        "mistral",
        '[TOOL_CALLS]find[CALL_ID]a1[ARGS]{"what": "x"}[TOOL_CALLS]add[ARGS]{}',
        {},
        ("", "", [FIND, Called("add", "{}")]),
    ),
    ("mistral", '[TOOL_CALLS]other[ARGS]{"what": "x"}', {}, ("", '[TOOL_CALLS]other[ARGS]{"what": "x"}', [])),
    ("mistral", f"[TOOL_CALLS][{call(what='x')}, {call('other')}]", {}, ("", f", {call('other')}]", [FIND])),
    ("mistral", "say [TOOL", {}, ("", "say [TOOL", [])),
    ("llama3", '{"name": "find", "parameters": {"what": "x"}}', {}, ("", "", [FIND])),
    ("llama3", '<|python_tag|>{"name": "find", "parameters": {"what": "x"}}', {}, ("", "", [FIND])),
    ("llama3", f"{call(what='x')}; {call('add')}", {}, ("", "", [FIND, Called("add", "{}")])),
    ("llama3", '{"answer": 42} is JSON', {}, ("", '{"answer": 42} is JSON', [])),
    ("pythonic", "<|tool_call_start|>[find(what='x')]<|tool_call_end|> Done.", {}, ("", "Done.", [FIND])),
    (
        "pythonic",
        """[find(what="a, b)", most=3, deep=[1, {'k': None}], sure=True), add()]""",
        {},
        (
            "",
            "",
            [
                Called("find", '{"what": "a, b)", "most": 3, "deep": [1, {"k": null}], "sure": true}'),
                Called("add", "{}"),
            ],
        ),
    ),
    (
        "pythonic",
        "[find(what=no literal, most=true,)]",
        {},
        ("", "", [Called("find", '{"what": "no literal", "most": true}')]),
    ),
    ("pythonic", f"<|tool_call_start|>[{call(what='x')}]<|tool_call_end|>", {}, ("", "", [FIND])),
    ("pythonic", "[find(what='x', most=", {}, ("", "", [Called("find", '{"what": "x"')])),
    ("pythonic", "[other(what='x')]", {}, ("", "[other(what='x')]", [])),
    ("pythonic", "[1, 2] is a list", {}, ("", "[1, 2] is a list", [])),
    ("pythonic", "[find('x')]", {}, ("", "[find('x')]", [])),
    ("llama3", "{not json", {}, ("", "{not json", [])),
]


@pytest.mark.parametrize(("tools", "text", "options", "expected"), CASES)
def test_every_split_gives_the_same_message(tools: Any, text: str, options: Any, expected: Any) -> None:
    assert read([text], tools, **options) == expected
    assert read(list(text), tools, **options) == expected
    for cut in range(len(text) + 1):
        assert read([text[:cut], text[cut:]], tools, **options) == expected
    for one, other in itertools.combinations(range(0, len(text), 3), 2):
        assert read([text[:one], text[one:other], text[other:]], tools, **options) == expected


STREAMED = [
    ("hermes", '<tool_call>{"name": "find", "arguments": ', '{"what": "a \\"}{ b"}', "}</tool_call>"),
    ("mistral", '[TOOL_CALLS][{"name": "find", "arguments": ', '{"what": [1, {"b": "]"}]}', "}]"),
    ("mistral", "[TOOL_CALLS]find[ARGS]", '{"what": "x"}', ""),
    ("llama3", '{"name": "find", "parameters": ', '{"what": "x"}', "}"),
]


@pytest.mark.parametrize(("tools", "before", "arguments", "after"), STREAMED)
def test_arguments_come_as_they_are_written(tools: Any, before: str, arguments: str, after: str) -> None:
    """No character of them waits for the next one."""
    parser = MessageParser(tools, ("find", "add"))
    parts = parser.push(before + arguments[0])
    assert parts == [CallBegun("find"), Arguments(arguments[0])]
    for letter in arguments[1:]:
        assert parser.push(letter) == [Arguments(letter)]
    assert [*parser.push(after), *parser.finish()] == []


def test_arguments_of_a_python_call_come_one_by_one() -> None:
    parser = MessageParser("pythonic", ("find",))
    assert parser.push("<|tool_call_start|>[find(what='x'") == [CallBegun("find")]
    assert parser.push(", most=") == [Arguments('{"what": "x"')]
    assert parser.push("3)") == [Arguments(', "most": 3'), Arguments("}")]


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-99, 99) | st.text(max_size=6),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=6,
    ),
    st.lists(st.integers(0, 200), max_size=6),
    st.sampled_from(["hermes", "mistral", "named", "llama3", "pythonic"]),
)
def test_any_arguments_at_any_split(value: Any, cuts: list[int], form: str) -> None:
    arguments = {"what": value, "most": 1}
    written = json.dumps(arguments)
    text = {
        "hermes": f'so <tool_call>{{"name": "find", "arguments": {written}}}</tool_call>',
        "mistral": f'[TOOL_CALLS][{{"name": "find", "arguments": {written}}}]',
        "named": f"[TOOL_CALLS]find[ARGS]{written}",
        "llama3": f'{{"name": "find", "parameters": {written}}}',
        "pythonic": f"<|tool_call_start|>[find(what={value!r}, most=1)]<|tool_call_end|>",
    }[form]
    places = sorted({min(cut, len(text)) for cut in cuts})
    pieces = [text[a:b] for a, b in itertools.pairwise([0, *places, len(text)])]
    _, said, (found,) = read(pieces, "mistral" if form == "named" else form)
    assert said == ("so" if form == "hermes" else "")
    assert (found.name, json.loads(found.arguments)) == ("find", arguments)


FRAGMENTS = [
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "[TOOL_CALLS]",
    "{",
    "}",
    '"',
    "[",
    "]",
    ";",
    " ",
    "\n",
    "a",
]
FRAGMENTS += ["<", "find", "[ARGS]", call(what="x"), '{"name": "add", "parameters": {}}', "<|python_tag|>"]
FRAGMENTS += ["<|tool_call_start|>", "<|tool_call_end|>", "find(", "what=", "'x'", ")", ",", "\\"]


@given(
    st.lists(st.sampled_from(FRAGMENTS), max_size=8).map("".join),
    st.lists(st.integers(0, 200), max_size=6),
    st.sampled_from([None, "hermes", "mistral", "llama3", "pythonic"]),
    st.booleans(),
    st.booleans(),
)
def test_hostile_texts_too(text: str, cuts: list[int], tools: Any, reasoning: bool, thinking: bool) -> None:
    """And nothing is lost but marks and white space beside them."""
    places = sorted({min(cut, len(text)) for cut in cuts})
    pieces = [text[a:b] for a, b in itertools.pairwise([0, *places, len(text)])]
    whole = read([text], tools, reasoning=reasoning, thinking=thinking)
    assert read(pieces, tools, reasoning=reasoning, thinking=thinking) == whole
    assert read(list(text), tools, reasoning=reasoning, thinking=thinking) == whole
    if tools is None and not reasoning and not thinking:
        assert whole == ("", text, [])


def test_formats_are_seen_in_templates() -> None:
    assert tool_format("{{ messages }}") is None
    assert tool_format("{% if tools %}<tool_call>{% endif %}") == "hermes"
    assert tool_format("{% if tools %}[TOOL_CALLS]{% endif %}") == "mistral"
    assert tool_format("{% if tools %}<|python_tag|>{% endif %}") == "llama3"
    assert tool_format("{% if tools %}<|tool_list_start|>{% endif %}") == "pythonic"
    assert thinks("a </think> b")
    assert not thinks("<think")
