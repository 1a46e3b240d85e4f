"""Anthropic's API, OpenAI's responses, llama.cpp's routes, vectors: each says what a chat says."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serve_cases import error_of, serving, with_template
from starlette.testclient import TestClient

HELLO = [{"role": "user", "content": "Who was in the house?"}]
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["n"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def client(novels_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    folder = with_template(Path(novels_folder), tmp_path_factory.mktemp("apis") / "novels-chat")
    with serving(("novels", folder)) as client:
        yield client


def post(client: TestClient, path: str, **body: Any) -> Any:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def named_events(client: TestClient, path: str, **body: Any) -> list[tuple[str, dict[str, Any]]]:
    response = client.post(path, json={**body, "stream": True})
    assert response.status_code == 200, response.text
    found = []
    for block in response.text.strip().split("\n\n"):
        name, data = block.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    assert all(name == data["type"] for name, data in found)
    return found


@pytest.fixture(scope="module")
def expected(client: TestClient) -> str:
    answer = post(client, "/v1/chat/completions", messages=HELLO, temperature=0, max_tokens=20)
    return str(answer["choices"][0]["message"]["content"])


def test_anthropic_messages(client: TestClient, expected: str) -> None:
    body = {"model": "novels", "messages": HELLO, "max_tokens": 20, "temperature": 0}
    answer = post(client, "/v1/messages", **body)
    assert answer["type"] == "message"
    assert answer["content"] == [{"type": "text", "text": expected}]
    assert answer["stop_reason"] == "max_tokens"
    assert answer["usage"]["output_tokens"] == 20
    count = post(client, "/v1/messages/count_tokens", model="novels", messages=HELLO)["input_tokens"]
    assert answer["usage"]["input_tokens"] + answer["usage"]["cache_read_input_tokens"] == count
    found = named_events(client, "/v1/messages", **body)
    names = [name for name, _ in found]
    assert names[:2] == ["message_start", "content_block_start"]
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(names[2:-3]) == {"content_block_delta"}
    assert "".join(data["delta"]["text"] for name, data in found if name == "content_block_delta") == expected
    stop = expected[5:9]
    stopped = post(client, "/v1/messages", **body, stop_sequences=[stop])
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", stop)
    assert named_events(client, "/v1/messages", **body, stop_sequences=[stop])[-2][1]["delta"]["stop_sequence"] == stop
    blocks = [{"role": "user", "content": [{"type": "text", "text": HELLO[0]["content"], "cache_control": {}}]}]
    assert post(client, "/v1/messages", **{**body, "messages": blocks})["content"] == answer["content"]
    billed = [{"type": "text", "text": "x-anthropic-billing-header: 123"}, {"type": "text", "text": "Hi."}]
    counts = [
        post(client, "/v1/messages/count_tokens", messages=HELLO, system=s)["input_tokens"] for s in (billed, "Hi.")
    ]
    assert counts[0] == counts[1]


def test_anthropic_tools(client: TestClient) -> None:
    tools = [{"name": "count", "input_schema": SCHEMA}]
    turns = [
        *HELLO,
        {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "count", "input": {"n": 1}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "1"}]},
    ]
    body = {"messages": turns, "max_tokens": 60, "tools": tools, "tool_choice": {"type": "any"}, "temperature": 0}
    answer = post(client, "/v1/messages", **body)
    (block,) = answer["content"]
    assert (block["type"], block["name"], answer["stop_reason"]) == ("tool_use", "count", "tool_use")
    found = named_events(client, "/v1/messages", **body)
    deltas = [data["delta"] for name, data in found if name == "content_block_delta"]
    assert json.loads("".join(delta["partial_json"] for delta in deltas)) == block["input"]
    assert len(deltas) > 1
    assert [name for name, _ in found].count("content_block_start") == 1
    lengths = range(answer["usage"]["output_tokens"])
    cut = [post(client, "/v1/messages", **{**body, "max_tokens": length + 1})["content"] for length in lengths]
    inputs = [block["input"] for blocks in cut for block in blocks if block["type"] == "tool_use"]
    assert {"INVALID_JSON": '{"n": '} in inputs or {"INVALID_JSON": '{"n":'} in inputs
    assert inputs[-1] == block["input"]
    for wrong, message in (
        ({"messages": [{"role": "system", "content": "x"}]}, "use user or assistant"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "reads text and tools"),
        ({"max_tokens": 0}, "max_tokens: "),
        ({"tool_choice": {"type": "some"}}, "use auto, any, tool or none"),
    ):
        response = client.post("/v1/messages", json={**body, **wrong})
        assert response.status_code == 400
        assert response.json()["type"] == "error"
        assert message in response.json()["error"]["message"]


def test_responses(client: TestClient, expected: str) -> None:
    body = {"model": "novels", "input": HELLO[0]["content"], "max_output_tokens": 20, "temperature": 0}
    answer = post(client, "/v1/responses", **body)
    assert answer["status"] == "incomplete"
    assert answer["output"][0]["content"][0]["text"] == expected
    assert answer["usage"]["output_tokens"] == 20
    items = [{"role": "user", "content": [{"type": "input_text", "text": HELLO[0]["content"]}]}]
    assert (
        post(client, "/v1/responses", **{**body, "input": items})["output"][0]["content"]
        == answer["output"][0]["content"]
    )
    counted = post(client, "/v1/responses/input_tokens", input=body["input"])
    assert counted["input_tokens"] == answer["usage"]["input_tokens"]
    found = named_events(client, "/v1/responses", **body)
    assert [data["sequence_number"] for _, data in found] == list(range(len(found)))
    names = [name for name, _ in found]
    assert names[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert names[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert "".join(data["delta"] for name, data in found if name == "response.output_text.delta") == expected
    assert found[-1][1]["response"]["output"][0]["content"] == answer["output"][0]["content"]
    assert (
        error_of(client.post("/v1/responses", json={**body, "previous_response_id": "r"}), 400)["param"]
        == "previous_response_id"
    )
    error_of(client.post("/v1/responses", json={"temperature": 0}), 400)
    tools = [{"type": "function", "name": "count", "parameters": SCHEMA}]
    called = post(client, "/v1/responses", **{**body, "max_output_tokens": 60}, tools=tools, tool_choice="required")
    (call,) = called["output"]
    assert (call["type"], call["name"], called["status"]) == ("function_call", "count", "completed")
    assert set(json.loads(call["arguments"])) >= {"n"}
    more = {"max_output_tokens": 60, "tools": tools, "tool_choice": "required"}
    found = named_events(client, "/v1/responses", **{**body, **more})
    pieces = [data["delta"] for name, data in found if name == "response.function_call_arguments.delta"]
    assert "".join(pieces) == call["arguments"]
    assert len(pieces) > 1
    (done,) = [data for name, data in found if name == "response.function_call_arguments.done"]
    assert (done["name"], done["arguments"]) == ("count", call["arguments"])
    assert found[-1][1]["response"]["output"][0]["arguments"] == call["arguments"]
    form = {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}}
    text = post(client, "/v1/responses", **{**body, "max_output_tokens": 60}, text=form)["output"][0]["content"][0][
        "text"
    ]
    assert 0 <= json.loads(text)["n"] <= 9


def test_routes_of_llama_cpp(client: TestClient, expected: str) -> None:
    prompt = post(client, "/apply-template", messages=HELLO)["prompt"]
    assert prompt == "user: Who was in the house?\nassistant:"
    body = {"prompt": prompt, "n_predict": 20, "temperature": 0}
    answer = post(client, "/completion", **body, return_tokens=True)
    assert answer["content"].strip() == expected.strip()
    assert answer["stop_type"] == "limit"
    assert answer["tokens_predicted"] == len(answer["tokens"]) == 20
    stream = client.post("/completion", json={**body, "stream": True}).text.strip().split("\n\n")
    objects = [json.loads(line.removeprefix("data: ")) for line in stream]
    assert "".join(each["content"] for each in objects) == answer["content"]
    assert [each["stop"] for each in objects] == [False] * (len(objects) - 1) + [True]
    found = json.loads(post(client, "/completion", prompt=prompt, json_schema=SCHEMA, n_predict=50)["content"])
    assert 0 <= found["n"] <= 9


def test_vectors(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    import torch

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=260, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40
    )
    transformers.BertModel(config).eval().save_pretrained(tmp_path / "bert")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({piece: index for index, piece in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.save(str(tmp_path / "bert" / "tokenizer.json"))
    with serving(("bert", tmp_path / "bert")) as client:
        texts = ["a house", "the sea", "a house"]
        answer = post(client, "/v1/embeddings", input=texts)
        vectors = np.array([each["embedding"] for each in answer["data"]])
        assert vectors.shape == (3, 32)
        assert np.array_equal(vectors[0], vectors[2])
        coded = post(client, "/v1/embeddings", input=texts, encoding_format="base64")["data"][1]["embedding"]
        assert np.frombuffer(base64.b64decode(coded), "<f4") == pytest.approx(vectors[1])
        ranked = post(client, "/v1/rerank", query="a house", documents=texts[1:], top_n=1, return_documents=True)
        assert ranked["results"][0]["index"] == 1
        assert ranked["results"][0]["relevance_score"] == pytest.approx(1.0)
        assert ranked["results"][0]["document"] == {"text": "a house"}
        assert (
            "makes vectors, not text" in error_of(client.post("/v1/completions", json={"prompt": "x"}), 400)["message"]
        )
        for wrong in ({"input": []}, {"input": [1, 2]}, {"input": ""}, {"input": "x", "dimensions": 5}):
            error_of(client.post("/v1/embeddings", json=wrong), 400)
