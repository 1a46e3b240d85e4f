"""llama.cpp's routes, conversations that go on from a message, and what the command line says in requests' stead."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serve_cases import TEMPLATE, error_of, serving, with_template
from starlette.testclient import TestClient

from kbit.serve.app import ServeOptions

HELLO = [{"role": "user", "content": "Who was in the house?"}]
PROMPT = "It was a dark and"
THINKING = TEMPLATE.replace("'assistant:'", "'assistant:<think>\n'") + "{# </think> #}"


@pytest.fixture(scope="module")
def chatting(novels_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_template(Path(novels_folder), tmp_path_factory.mktemp("native") / "novels-chat")


@pytest.fixture(scope="module")
def client(chatting: Path) -> Iterator[TestClient]:
    with serving(("novels", chatting)) as client:
        yield client


def complete(client: TestClient, prompt: Any = PROMPT, **body: Any) -> Any:
    response = client.post("/completion", json={"prompt": prompt, "temperature": 0, "n_predict": 6, **body})
    assert response.status_code == 200, response.text
    return response.json()


def test_prompts_of_text_and_tokens(client: TestClient) -> None:
    ids = client.post("/tokenize", json={"content": PROMPT, "add_special": True}).json()["tokens"]
    whole = complete(client, return_tokens=True)
    assert len(whole["tokens"]) == 6
    assert whole["timings"]["predicted_n"] == 6
    assert whole["timings"]["prompt_n"] + whole["timings"]["cache_n"] == len(ids)
    assert whole["stop_type"] == "limit"
    alike = complete(client, [ids, PROMPT, {"prompt_string": PROMPT}])
    assert [each["index"] for each in alike] == [0, 1, 2]
    assert {each["content"] for each in alike} == {whole["content"]}
    rest = client.post("/tokenize", json={"content": " and"}).json()["tokens"]
    assert complete(client, [*ids, " and"])["prompt"] == complete(client, [*ids, *rest])["prompt"]
    for prompt in ({"prompt_string": "x", "multimodal_data": "AA"}, [], [[]], [None], 7, None):
        error_of(client.post("/completion", json={"prompt": prompt}), 400)


def test_probabilities_and_fields(client: TestClient) -> None:
    whole = complete(client, n_probs=3, return_tokens=True)
    tokens = whole["completion_probabilities"]
    assert [each["id"] for each in tokens] == whole["tokens"]
    for each in tokens:
        assert each["top_logprobs"][0]["id"] == each["id"]  # temperature 0
        assert bytes(each["bytes"]).decode() == each["token"]
        assert len(each["top_logprobs"]) == 3
    stream = client.post("/completion", json={"prompt": PROMPT, "temperature": 0, "n_predict": 6, "stream": True})
    chunks = [json.loads(each.removeprefix("data: ")) for each in stream.text.strip().split("\n\n")]
    assert "".join(chunk["content"] for chunk in chunks) == whole["content"]
    assert [token for chunk in chunks for token in chunk["tokens"]] == whole["tokens"]
    assert [chunk["stop"] for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1]["generation_settings"]["n_predict"] == 6
    fields = ["content", "timings/predicted_n", "nothing/here"]
    assert complete(client, response_fields=fields) == {"content": whole["content"], "timings/predicted_n": 6}
    error = error_of(client.post("/completion", json={"prompt": "x", "dry_multiplier": 0.8}), 400)
    assert error["param"] == "dry_multiplier"
    assert complete(client, dry_multiplier=0, mirostat=0)["content"] == whole["content"]


@pytest.mark.parametrize("form", ["pairs", "object", "texts", "false"])
def test_biases(client: TestClient, form: str) -> None:
    free = complete(client, return_tokens=True)
    token = free["tokens"][0]
    text = client.post("/detokenize", json={"tokens": [token]}).json()["content"]
    given: Any = {
        "pairs": [[token, -100]],
        "object": {str(token): -100},
        "texts": [[text, -100]],
        "false": [[token, False]],
    }[form]
    assert token not in complete(client, logit_bias=given, return_tokens=True)["tokens"]
    error_of(client.post("/completion", json={"prompt": "x", "logit_bias": [7]}), 400)


def test_an_end_that_is_ignored_is_not_chosen(client: TestClient) -> None:
    settings = complete(client, ignore_eos=True, n_predict=40, return_tokens=True)
    ends = [each["token"] for each in settings["generation_settings"]["logit_bias"]]
    assert ends
    assert all(each["bias"] is None for each in settings["generation_settings"]["logit_bias"])
    assert not set(ends) & set(settings["tokens"])


def test_what_is_not_there_is_refused_by_name(client: TestClient) -> None:
    assert client.get("/lora-adapters").json() == []
    for path in ("/slots/0?action=save", "/lora-adapters"):
        assert error_of(client.post(path, json={}), 501)["code"] == "not_supported"
    assert "--slot-save-path" in error_of(client.post("/slots/0?action=save", json={"filename": "a"}), 501)["message"]
    error = error_of(client.post("/infill", json={"input_prefix": "def f(", "input_suffix": ")"}), 400)
    assert "not trained to fill in" in error["message"]


def chat(client: TestClient, **body: Any) -> Any:
    response = client.post("/chat/completions", json={"temperature": 0, "max_tokens": 5, "verbose": True, **body})
    assert response.status_code == 200, response.text
    return response.json()


def test_an_answer_goes_on_from_the_assistants_message(client: TestClient) -> None:
    begun = [*HELLO, {"role": "assistant", "content": "There was"}]
    for more in (
        {},
        {"continue_final_message": True},
        {"continue_final_message": True, "add_generation_prompt": False},
    ):
        assert chat(client, messages=begun, **more)["__verbose"]["prompt"].endswith("assistant:There was")
    assert chat(client, messages=begun, continue_final_message=False)["__verbose"]["prompt"].endswith("assistant:")
    whole = client.post("/chat/completions/input_tokens", json={"messages": begun}).json()["input_tokens"]
    assert whole == chat(client, messages=begun)["usage"]["prompt_tokens"]
    both = {"continue_final_message": True, "add_generation_prompt": True}
    for messages, more in ((begun, both), (HELLO, {"continue_final_message": True}), ([*begun, begun[-1]], {})):
        error_of(client.post("/chat/completions", json={"messages": messages, **more}), 400)


def test_what_holds_where_a_request_does_not_say(chatting: Path) -> None:
    """A template, no thoughts, a seed, a length; a request that says otherwise is obeyed."""
    with serving(
        ("novels", chatting),
        options=ServeOptions(origins=["localhost"]),
        chat_template=THINKING,
        reasoning="off",
        sampling={"seed": 7, "temperature": 1.0},
        max_tokens=9,
    ) as client:
        rendered = client.post("/apply-template", json={"messages": HELLO}).json()["prompt"]
        assert rendered.endswith("assistant:<think>\n</think>")
        bodies = [{"prompt": PROMPT}, {"prompt": PROMPT, "seed": 7}]
        written = {"regex": "yes</think>no", "max_tokens": 40, "chat_template_kwargs": {"enable_thinking": True}}
        for form, thought, said in (("auto", "yes", "no"), ("deepseek", "yes", "no"), ("none", None, "yes</think>no")):
            message = chat(client, messages=HELLO, **written, reasoning_format=form)["choices"][0]["message"]
            assert (message.get("reasoning_content"), message["content"]) == (thought, said)
        answers = [client.post("/v1/completions", json=each).json() for each in bodies]
        assert answers[0]["usage"]["completion_tokens"] == 9
        assert len({each["choices"][0]["text"] for each in answers}) == 1
        other = client.post("/v1/completions", json={"prompt": PROMPT, "seed": 8, "max_tokens": 4}).json()
        assert other["usage"]["completion_tokens"] == 4
        params = client.get("/props").json()["default_generation_settings"]["params"]
        assert (params["seed"], params["n_predict"]) == (7, 9)
        asks = {"access-control-request-method": "POST"}
        for origin, allowed in (("http://127.0.0.1:3000", True), ("http://localhost.evil.example", False)):
            response = client.options("/v1/completions", headers={**asks, "origin": origin})
            assert response.status_code == 200
            assert (response.headers.get("access-control-allow-origin") == origin) == allowed
