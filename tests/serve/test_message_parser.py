"""Messages read from text as it comes: the same wherever it is cut."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kbit.serve.message_parser import Called, MessageParser, Part, Said, thinks, tool_format


def read(pieces: list[str], tools: Any = None, **options: Any) -> tuple[str, str, list[Called]]:
    """(thought, text, calls) of an answer in pieces."""
    parser = MessageParser(tools, ("find", "add"), **options)
    parts: list[Part] = [part for piece in pieces for part in parser.push(piece)]
    parts += parser.finish()
    assert parser.finish() == []
    assert all(part.text for part in parts if isinstance(part, Said))
    thought = "".join(part.text for part in parts if isinstance(part, Said) and part.thought)
    text = "".join(part.text for part in parts if isinstance(part, Said) and not part.thought)
    return thought, text, [part for part in parts if isinstance(part, Called)]


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
    ("hermes", "<tool_call>not json</tool_call> after", {}, ("", "<tool_call>not json</tool_call> after", [])),
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
    ("mistral", "say [TOOL", {}, ("", "say [TOOL", [])),
    ("llama3", '{"name": "find", "parameters": {"what": "x"}}', {}, ("", "", [FIND])),
    ("llama3", '<|python_tag|>{"name": "find", "parameters": {"what": "x"}}', {}, ("", "", [FIND])),
    ("llama3", f"{call(what='x')}; {call('add')}", {}, ("", "", [FIND, Called("add", "{}")])),
    ("llama3", '{"answer": 42} is JSON', {}, ("", '{"answer": 42} is JSON', [])),
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


@given(
    st.lists(st.sampled_from(FRAGMENTS), max_size=8).map("".join),
    st.lists(st.integers(0, 200), max_size=6),
    st.sampled_from([None, "hermes", "mistral", "llama3"]),
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
    assert thinks("a </think> b")
    assert not thinks("<think")
