"""POST /v1/chat/completions over a small real model with a chat template."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serve_cases import TEMPLATE, error_of, events, serving, with_template
from starlette.testclient import TestClient

HELLO = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who was in the house?"}]
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "meet", "description": "Meets.", "parameters": PERSON}},
    {"type": "function", "function": {"name": "wait", "parameters": {"type": "object", "properties": {}}}},
]


@pytest.fixture(scope="module")
def client(novels_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    folder = with_template(Path(novels_folder), tmp_path_factory.mktemp("chat") / "novels-chat")
    with serving(("novels", folder), ("plain", Path(novels_folder))) as client:
        yield client


def chat(client: TestClient, **body: Any) -> Any:
    response = client.post("/v1/chat/completions", json={"messages": HELLO, "temperature": 0, "max_tokens": 20, **body})
    assert response.status_code == 200, response.text
    return response.json()


def test_a_chat_is_its_template(client: TestClient) -> None:
    answer = chat(client)
    assert answer["object"] == "chat.completion"
    (choice,) = answer["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["refusal"] is None
    assert choice["logprobs"] is None
    prompt = "system: Be brief.\nuser: Who was in the house?\nassistant:"
    plain = client.post("/v1/completions", json={"prompt": prompt, "temperature": 0, "max_tokens": 20}).json()
    assert plain["choices"][0]["text"].strip() == choice["message"]["content"].strip()
    assert plain["usage"]["prompt_tokens"] == answer["usage"]["prompt_tokens"]
    parts = [{"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]}]
    again = chat(client, messages=[*parts, HELLO[1]], max_tokens=None, max_completion_tokens=20)
    assert again["choices"] == answer["choices"]
    tokens = client.post("/tokenize", json={"messages": HELLO}).json()
    assert tokens["count"] == answer["usage"]["prompt_tokens"]
    assert client.post("/detokenize", json={"tokens": tokens["tokens"]}).json()["prompt"] == prompt


@pytest.mark.parametrize("more", [{}, {"n": 3, "temperature": 1, "seed": 2}, {"logprobs": True, "top_logprobs": 2}])
def test_a_stream_says_what_an_answer_says(client: TestClient, more: dict[str, Any]) -> None:
    whole = chat(client, **more)
    body = {"messages": HELLO, "temperature": 0, "max_tokens": 20, **more, "stream": True}
    chunks = events(client.post("/v1/chat/completions", json={**body, "stream_options": {"include_usage": True}}))
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    for expected in whole["choices"]:
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == expected["index"]]
        assert mine[0]["delta"] == {"role": "assistant", "content": None}
        assert sum("role" in choice["delta"] for choice in mine) == 1
        assert "".join(c["delta"].get("content") or "" for c in mine) == expected["message"]["content"]
        assert mine[-1]["delta"] == {}
        assert [choice["finish_reason"] for choice in mine] == [None] * (len(mine) - 1) + [expected["finish_reason"]]
        if "logprobs" in more:
            told = [each for choice in mine if choice["logprobs"] for each in choice["logprobs"]["content"]]
            assert told == expected["logprobs"]["content"]
            assert all(len(each["top_logprobs"]) == 2 for each in told)
            assert bytes(b for each in told for b in each["bytes"]).decode() == expected["message"]["content"]
    silent = events(client.post("/v1/chat/completions", json=body))
    assert all("usage" not in chunk for chunk in silent)


def test_answers_have_the_form_that_was_asked_for(client: TestClient) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    for seed in range(3):
        answer = chat(client, response_format=form, temperature=1.5, seed=seed, max_tokens=100)["choices"][0]
        person = json.loads(answer["message"]["content"])
        assert set(person) == {"name", "age"}
        assert 0 <= person["age"] <= 99
        assert answer["finish_reason"] == "stop"
    loose = chat(
        client, response_format={"type": "json_object"}, logit_bias={}, max_tokens=150, temperature=0.8, seed=4
    )
    text = loose["choices"][0]["message"]["content"]
    assert text.startswith("{")
    if loose["choices"][0]["finish_reason"] == "stop":
        assert isinstance(json.loads(text), dict)


def test_a_schema_that_cannot_be_enforced_is_refused(client: TestClient) -> None:
    for schema, word in (
        ({"type": "object", "not": {"required": ["a"]}}, "not"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "nonsense"}, "nonsense"),
    ):
        body = {"messages": HELLO, "response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}
        error = error_of(client.post("/v1/chat/completions", json=body), 400)
        assert error["param"] == "response_format"
        assert word in error["message"]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "meet"}}])
def test_a_call_is_forced_and_read(client: TestClient, choice: Any) -> None:
    body = {"tools": TOOLS, "tool_choice": choice, "temperature": 1.2, "seed": 1, "max_tokens": 120}
    answer = chat(client, **body)["choices"][0]
    assert answer["finish_reason"] == "tool_calls"
    assert answer["message"]["content"] is None
    (call,) = answer["message"]["tool_calls"]
    assert call["type"] == "function"
    arguments = json.loads(call["function"]["arguments"])
    if choice != "required":
        assert call["function"]["name"] == "meet"
    if call["function"]["name"] == "meet":
        assert set(arguments) == {"name", "age"}
    chunks = events(client.post("/v1/chat/completions", json={"messages": HELLO, **body, "stream": True}))
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    first, *rest = [part for delta in deltas for part in delta.get("tool_calls", [])]
    assert (first["index"], first["type"]) == (0, "function")
    assert first["function"] == {"name": call["function"]["name"], "arguments": ""}
    assert all(set(part) == {"index", "function"} and part["index"] == 0 for part in rest)
    pieces = [part["function"]["arguments"] for part in rest]
    assert "".join(pieces) == call["function"]["arguments"]
    assert len(pieces) > 1
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("mark", ["[TOOL_CALLS]", "<|python_tag|>", "<|tool_list_start|>"])
def test_a_call_is_forced_in_every_format(novels_folder: str, mark: str) -> None:
    """What the constraint allows is what the parser of the same format reads, streamed or whole."""
    template = TEMPLATE + "{# " + mark + " #}"
    body = {"messages": HELLO, "tools": TOOLS, "tool_choice": {"function": {"name": "meet"}}, "max_tokens": 150}
    with serving(("novels", Path(novels_folder)), chat_template=template, sampling={"seed": 3}) as client:
        message = chat(client, **body)["choices"][0]["message"]
        (call,) = message["tool_calls"]
        assert set(json.loads(call["function"]["arguments"])) == {"name", "age"}
        assert message["content"] is None
        chunks = events(client.post("/v1/chat/completions", json={**body, "temperature": 0, "stream": True}))
        deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
        parts = [part["function"] for delta in deltas for part in delta.get("tool_calls", [])]
        assert "".join(part["arguments"] for part in parts) == call["function"]["arguments"]
        assert [part["name"] for part in parts if "name" in part] == ["meet"]


def test_a_call_is_forced_where_its_marks_are_tokens(novels_folder: str, tmp_path: Path) -> None:
    """As in Qwen's vocabulary: a constraint that asked for their letters would allow nothing."""
    folder = with_template(Path(novels_folder), tmp_path / "marked", TEMPLATE)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary, merges = tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
    for mark in ("<tool_call>", "</tool_call>"):
        last = max((text for text in vocabulary if not text.endswith("call>")), key=vocabulary.__getitem__)
        vocabulary[mark] = vocabulary.pop(last)
        merges[:] = [pair for pair in merges if last not in ("".join(pair), *pair)]
        added = {**tokenizer["added_tokens"][0], "id": vocabulary[mark], "content": mark, "special": False}
        tokenizer["added_tokens"].append(added)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    body = {"tools": TOOLS, "tool_choice": {"function": {"name": "meet"}}, "max_tokens": 150}
    with serving(("marked", folder)) as client:
        choice = chat(client, **body)["choices"][0]
        assert choice["finish_reason"] == "tool_calls"
        (call,) = choice["message"]["tool_calls"]
        assert set(json.loads(call["function"]["arguments"])) == {"name", "age"}


def test_calls_and_results_go_back_into_the_prompt(client: TestClient) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "wait", "arguments": "{}"}}
    messages = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "done"},
    ]
    assert chat(client, messages=messages, tools=TOOLS, tool_choice="none")["choices"][0]["message"]["content"]


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages", "messages[0].role 'king'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "reads text only"),
        ({"messages": HELLO, "top_logprobs": 3}, "top_logprobs", "needs logprobs"),
        ({"messages": HELLO, "modalities": ["audio"]}, "modalities", "text only"),
        ({"messages": HELLO, "functions": [{"name": "f"}]}, "functions", "use tools"),
        ({"messages": HELLO, "tool_choice": "required"}, "tool_choice", "there are no tools"),
        ({"messages": HELLO, "tools": TOOLS, "tool_choice": {"function": {"name": "x"}}}, "tool_choice", "no tool 'x'"),
        ({"messages": HELLO, "response_format": {"type": "xml"}}, "response_format", "use text, json_object"),
        ({"messages": HELLO, "model": "plain"}, None, "has no chat template"),
    ],
)
def test_what_is_wrong_is_named(client: TestClient, body: dict[str, Any], param: str | None, message: str) -> None:
    error = error_of(client.post("/v1/chat/completions", json=body), 400)
    assert message in error["message"]
    assert error["param"] == param
