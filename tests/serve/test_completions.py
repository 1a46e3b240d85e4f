"""POST /v1/completions over a small real model."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serve_cases import error_of, events, serving
from starlette.testclient import TestClient

from kbit.engine.generate import generate
from kbit.engine.loader import LoadedModel, load_model

PROMPT = "It was a dark night, and"


@pytest.fixture(scope="module")
def client(novels_folder: str) -> Iterator[TestClient]:
    with serving(("novels", Path(novels_folder))) as client:
        yield client


@pytest.fixture(scope="module")
def loaded(novels_folder: str) -> LoadedModel:
    return load_model(novels_folder, threads=1)


def complete(client: TestClient, **body: Any) -> Any:
    response = client.post("/v1/completions", json={"model": "novels", "temperature": 0, **body})
    assert response.status_code == 200, response.text
    return response.json()


def test_the_text_is_that_of_kbit_run(client: TestClient, loaded: LoadedModel) -> None:
    prompt = loaded.tokenizer.encode(PROMPT)
    expected = generate(loaded.decoder, loaded.tokenizer, prompt, max_tokens=30).run()
    answer = complete(client, prompt=PROMPT, max_tokens=30)
    assert answer["object"] == "text_completion"
    (choice,) = answer["choices"]
    assert choice == {"index": 0, "text": expected.text, "logprobs": None, "finish_reason": "length"}
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (
        len(prompt),
        30,
        len(prompt) + 30,
    )
    assert complete(client, prompt=prompt, max_tokens=30)["choices"] == answer["choices"]
    assert len(complete(client, prompt=PROMPT)["choices"][0]["text"]) > 0  # 16 tokens, as OpenAI has it


def test_lists_of_prompts_and_choices(client: TestClient) -> None:
    bodies = {"max_tokens": 12, "temperature": 1, "top_p": 0.9, "seed": 5}
    prompts = ["He said", "She said that", [5, 6, 7]]
    answer = complete(client, prompt=prompts, n=2, **bodies)
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    for index, prompt in enumerate(prompts):
        alone = complete(client, prompt=prompt, n=2, **bodies)["choices"]
        assert [choice["text"] for choice in alone] == [c["text"] for c in answer["choices"][2 * index : 2 * index + 2]]
    streamed = events(client.post("/v1/completions", json={"prompt": prompts, "n": 2, "stream": True, **bodies}))
    texts = ["".join(c["text"] for e in streamed for c in e["choices"] if c["index"] == i) for i in range(6)]
    assert texts == [choice["text"] for choice in answer["choices"]]


def test_a_stream_says_what_an_answer_says(client: TestClient) -> None:
    for body in (
        {"prompt": PROMPT, "max_tokens": 20, "logprobs": 3},
        {"prompt": PROMPT, "max_tokens": 20, "logprobs": 2, "echo": True},
        {"prompt": PROMPT, "max_tokens": 40, "stop": ["the", "of"], "logprobs": 0},
        {"prompt": PROMPT, "max_tokens": 7, "echo": True},
    ):
        whole = complete(client, **body)
        request = {**body, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
        chunks = events(client.post("/v1/completions", json=request))
        assert len({chunk["id"] for chunk in chunks}) == 1
        assert chunks[-1]["choices"] == []
        counts = ("prompt_tokens", "completion_tokens", "total_tokens")
        assert [chunks[-1]["usage"][name] for name in counts] == [whole["usage"][name] for name in counts]
        assert all(chunk["usage"] is None for chunk in chunks[:-1])
        choices = [chunk["choices"][0] for chunk in chunks[:-1]]
        expected = whole["choices"][0]
        assert "".join(choice["text"] for choice in choices) == expected["text"]
        assert choices[-1]["finish_reason"] == expected["finish_reason"]
        assert all(choice["finish_reason"] is None for choice in choices[:-1])
        if "logprobs" in body:
            for key, values in expected["logprobs"].items():
                parts = [choice["logprobs"][key] for choice in choices if choice["logprobs"] is not None]
                joined = None if all(part is None for part in parts) else list(itertools.chain(*parts))
                assert joined == values


def test_echoed_log_probabilities_are_those_of_an_evaluation(client: TestClient, loaded: LoadedModel) -> None:
    """What lm-eval asks for: token ids, echo, one more token."""
    ids = loaded.tokenizer.encode("The old man looked at the sea, and then at the ship that had come in.")
    answer = complete(client, prompt=ids, echo=True, logprobs=1, max_tokens=1)["choices"][0]["logprobs"]
    logits = loaded.decoder.extend(ids, loaded.decoder.new_cache(1, 200), last_only=False).astype("float64")
    assert answer["token_logprobs"][0] is None
    assert len(answer["token_logprobs"]) == len(ids) + 1
    for row, token, found, top in zip(
        logits, ids[1:], answer["token_logprobs"][1:], answer["top_logprobs"][1:], strict=False
    ):
        shifted = row - row.max()
        expected = shifted - np.log(np.exp(shifted).sum())
        assert found == pytest.approx(expected[token], abs=1e-5)
        assert max(top.values()) == pytest.approx(expected.max(), abs=1e-5)
    text = loaded.tokenizer.decode(ids, skip_special_tokens=False)
    for token, at in zip(answer["tokens"][:-1], answer["text_offset"][:-1], strict=True):
        assert text[at:].startswith(token)
    scored = complete(client, prompt=ids, echo=True, logprobs=1, max_tokens=0)["choices"][0]
    assert scored["logprobs"]["token_logprobs"] == answer["token_logprobs"][:-1]
    assert scored["text"] == text


def test_many_at_once_are_answered_as_if_alone(client: TestClient) -> None:
    bodies = [
        {
            "prompt": f"Chapter {i}. {PROMPT * (1 + i % 3)}",
            "max_tokens": 25,
            "temperature": 0.9,
            "seed": i,
            "n": 1 + i % 2,
        }
        for i in range(12)
    ]
    alone = [complete(client, **body)["choices"] for body in bodies]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda body: complete(client, **body)["choices"], bodies * 2))
    assert together == alone * 2
    answer = complete(client, prompt=PROMPT * 15, max_tokens=1)
    again = complete(client, prompt=PROMPT * 15, max_tokens=1)
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] >= 64
    assert answer["choices"] == again["choices"]


def test_settings_do_what_they_say(client: TestClient, loaded: LoadedModel) -> None:
    wanted = loaded.tokenizer.encode("z")[-1]
    biased = complete(client, prompt=PROMPT, max_tokens=5, logit_bias={str(wanted): 100}, logprobs=0)["choices"][0]
    assert set(biased["logprobs"]["tokens"]) == {"z"}
    stopped = complete(client, prompt=PROMPT, max_tokens=50, stop_token_ids=[loaded.tokenizer.encode(" the")[-1]])
    assert stopped["choices"][0]["finish_reason"] in ("stop", "length")
    free = complete(client, prompt=PROMPT, max_tokens=50)["choices"][0]["text"]
    stop = free[10:14]
    assert complete(client, prompt=PROMPT, max_tokens=50, stop=stop)["choices"][0]["text"] == free[: free.index(stop)]
    assert complete(client, prompt=PROMPT, regex="(yes|no)", max_tokens=20)["choices"][0]["text"] in ("yes", "no")
    lark = 'start: "a" /[0-9]{3}/'
    text = complete(client, prompt=PROMPT, grammar=lark, max_tokens=20)["choices"][0]["text"]
    assert text[0] == "a"
    assert text[1:].isdecimal()
    assert len(text) == 4
    gbnf = 'root ::= ("ab" | "ba") "!"'
    assert complete(client, prompt=PROMPT, grammar=gbnf, max_tokens=9)["choices"][0]["text"] in ("ab!", "ba!")


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"prompt": "x", "temperature": -1}, "temperature", "temperature -1.0: expected"),
        ({"prompt": "x", "top_p": 2}, "top_p", "top_p 2.0: expected a probability"),
        ({"prompt": "x", "n": 0}, "n", "n: Input should be greater"),
        ({"prompt": "x", "frob": 1}, "frob", "does not know this field"),
        ({"prompt": "x", "suffix": "y"}, "suffix", "does not fill in"),
        ({"prompt": "x", "best_of": 3}, "best_of", "more than n"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens", "generates nothing"),
        ({"prompt": []}, "prompt", "0 prompts"),
        ({"prompt": [[]]}, "prompt", "a prompt is empty"),
        ({"prompt": [1, 99999999]}, None, "outside the model's vocabulary"),
        ({"prompt": [[-1]]}, None, "outside the model's vocabulary"),
        ({"prompt": {"a": 1}}, "prompt", "prompt: "),
        ({"prompt": "x", "logprobs": 21}, "logprobs", "less than or equal to 20"),
        ({"prompt": "x", "logit_bias": {"nine": 1}}, "logit_bias", "no token id"),
        ({"prompt": "x", "logit_bias": {"5": 101}}, "logit_bias", "from -100 to 100"),
        ({"prompt": "x", "regex": "("}, "regex", "cannot be enforced"),
        ({"prompt": "x", "grammar": "start: nothing"}, "grammar", "cannot be enforced"),
        ({"prompt": "x", "regex": "a", "grammar": "start: /a/"}, "grammar", "can have one form"),
        ({"prompt": "x", "stop": ["a"] * 65}, "stop", "of at most 64"),
        ({"prompt": "x", "stop": ""}, "stop", "a stop string needs at least one character"),
        ({"prompt": "\ud800"}, None, "not valid Unicode"),
    ],
)
def test_what_is_wrong_is_named(client: TestClient, body: dict[str, Any], param: str | None, message: str) -> None:

    for more in ({}, {"stream": True}):
        data = json.dumps({**body, **more})
        error = error_of(
            client.post("/v1/completions", content=data, headers={"content-type": "application/json"}), 400
        )
        assert message in error["message"]
        assert error["param"] == param


def test_too_long_says_both_numbers(client: TestClient) -> None:
    for stream in (False, True):
        error = error_of(client.post("/v1/completions", json={"prompt": [5] * 300, "stream": stream}), 400)
        assert error["code"] == "context_length_exceeded"
        assert (error["n_prompt_tokens"], error["n_ctx"]) == (300, 256)
        assert "300 tokens" in error["message"]
        assert "256" in error["message"]
    full = complete(client, prompt=[5] * 250, max_tokens=100, ignore_eos=True)
    assert full["choices"][0]["finish_reason"] == "length"
    assert full["usage"]["completion_tokens"] == 6
