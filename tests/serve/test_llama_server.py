"""What programs for llama-server ask of a stream and of a server: progress, times, probabilities, names, figures."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serve_cases import TEMPLATE, error_of, events, serving
from starlette.testclient import TestClient

from kbit.serve.app import ServeOptions

LONG = "It was a dark and stormy night; the rain fell in torrents. " * 8


@pytest.fixture(scope="module")
def client(novels_folder: str) -> Iterator[TestClient]:
    template = TEMPLATE + "{{ functions }}{{ today }}"
    more: dict[str, Any] = {"chat_template": template, "template_variables": {"today": "Monday"}, "tags": ("small",)}
    with serving(("novels,books", Path(novels_folder)), batch_tokens=32, **more) as client:
        yield client


def stream(client: TestClient, path: str, **body: Any) -> list[dict[str, Any]]:
    response = client.post(path, json={**body, "stream": True})
    assert response.status_code == 200, response.text
    lines = [line for line in response.text.split("\n") if line.startswith("data: {")]
    return [json.loads(line.removeprefix("data: ")) for line in lines]


@pytest.mark.parametrize(
    ("path", "prompt"),
    [
        ("/completion", {"prompt": LONG, "n_predict": 4}),
        ("/v1/completions", {"prompt": LONG, "max_tokens": 4}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": LONG}], "max_tokens": 4}),
        ("/v1/responses", {"input": LONG, "max_output_tokens": 4}),
    ],
)
def test_how_far_a_prompt_is(client: TestClient, path: str, prompt: dict[str, Any]) -> None:
    chunks = stream(client, path, **prompt, return_progress=True, timings_per_token=True)
    told = [chunk for chunk in chunks if "prompt_progress" in chunk]
    steps = [chunk["prompt_progress"] for chunk in told]
    assert steps[0]["processed"] == steps[0]["cache"]
    assert told[0]["timings"]["prompt_ms"] == 0
    done = [step["processed"] for step in steps]
    assert done == sorted(set(done))
    assert done[-1] == steps[-1]["total"]
    assert all(later - sooner <= 32 for sooner, later in itertools.pairwise(done))  # a pass has 32 tokens
    times = [chunk["timings"] for chunk in chunks if "timings" in chunk]
    assert times[-1]["predicted_n"] == 4
    assert all(value >= 0 for each in times for value in each.values())
    quiet = stream(client, path, **prompt)
    assert not any("prompt_progress" in chunk for chunk in quiet)
    again = stream(client, path, **prompt, return_progress=True)
    first = next(chunk["prompt_progress"] for chunk in again if "prompt_progress" in chunk)
    assert first["cache"] > 0


def complete(client: TestClient, **body: Any) -> Any:
    response = client.post("/completion", json={"prompt": "It was a dark and", "n_predict": 5, "seed": 3, **body})
    assert response.status_code == 200, response.text
    return response.json()


def test_probabilities_after_all_settings(client: TestClient) -> None:
    """At temperature 1 and without cuts they are the model's own; cuts leave the rest, which adds up to 1."""
    model = complete(client, temperature=1, n_probs=4)["completion_probabilities"]
    same = complete(client, temperature=1, n_probs=4, post_sampling_probs=True)["completion_probabilities"]
    assert [each["id"] for each in same] == [each["id"] for each in model]
    for own, after in zip(model, same, strict=True):
        assert after["prob"] == pytest.approx(math.exp(own["logprob"]), rel=1e-5)
        assert [each["id"] for each in after["top_probs"]] == [each["id"] for each in own["top_logprobs"]]
    cut = complete(client, temperature=0.7, top_k=3, n_probs=9, post_sampling_probs=True)
    for each in cut["completion_probabilities"]:
        assert len(each["top_probs"]) == 3
        assert sum(other["prob"] for other in each["top_probs"]) == pytest.approx(1)
        assert each["id"] in [other["id"] for other in each["top_probs"]]
    (greedy,) = complete(client, temperature=0, n_predict=1, n_probs=3, post_sampling_probs=True)[
        "completion_probabilities"
    ]
    assert greedy["prob"] == 1
    assert [other["id"] for other in greedy["top_probs"]] == [greedy["id"]]
    shape = complete(client, temperature=1, n_probs=500, post_sampling_probs=True, grammar='start: "yes" | "no"')
    for each in shape["completion_probabilities"]:
        assert sum(other["prob"] for other in each["top_probs"]) == pytest.approx(1)
        assert all(other["token"][:1] in "yesno" for other in each["top_probs"])


def test_names_and_tags(client: TestClient) -> None:
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["aliases"], model["tags"]) == ("novels", ["novels", "books"], ["small"])
    assert client.get("/v1/models/books").json()["id"] == "novels"
    for name in ("novels", "books"):
        assert complete(client, model=name)["model"] == "novels"
    error_of(client.post("/completion", json={"prompt": "x", "model": "songs"}), 404)


def test_variables_of_templates(client: TestClient) -> None:
    messages = [{"role": "user", "content": "Hello."}]
    for more, day in (({}, "Monday"), ({"chat_template_kwargs": {"today": "Friday"}}, "Friday")):
        prompt = client.post("/apply-template", json={"messages": messages, **more}).json()["prompt"]
        assert prompt.endswith(f"assistant:{day}")
    tools = [{"type": "function", "function": {"name": "wait"}}]
    prompt = client.post("/apply-template", json={"messages": messages, "tools": tools}).json()["prompt"]
    assert json.loads(prompt.partition("assistant:")[2].removesuffix("Monday")) == tools


def test_figures_under_llama_servers_names(client: TestClient) -> None:
    def figures() -> dict[str, float]:
        response = client.get("/metrics")
        assert int(response.headers["process-start-time-unix"]) > 0
        lines = [line.split(" ") for line in response.text.splitlines() if line.startswith("llamacpp:")]
        return {name.removeprefix("llamacpp:"): float(value) for name, value in lines}

    before = figures()
    answer = complete(client, prompt=LONG + "And then", n_predict=7)
    after = figures()
    added = {name: after[name] - before[name] for name in after}
    assert added["tokens_predicted_total"] == 7
    assert added["prompt_tokens_total"] == answer["timings"]["prompt_n"]
    assert added["prompt_tokens_cached_total"] == answer["timings"]["cache_n"]
    assert added["n_decode_total"] > 0
    assert after["n_tokens_max"] >= answer["tokens_evaluated"] + 7
    assert after["requests_processing"] == 0


def test_several_requests_of_vertex(client: TestClient) -> None:
    chat = {"messages": [{"role": "user", "content": "Hello."}], "max_tokens": 3, "temperature": 0}
    text = {"prompt": "It was", "max_tokens": 3, "temperature": 0}
    instances = [{"@requestFormat": "chatCompletions", **chat}, {"@requestFormat": "completions", **text}]
    said, gone_on = client.post("/predict", json={"instances": instances}).json()["predictions"]
    alone = client.post("/v1/chat/completions", json=chat).json()
    assert said["choices"][0]["message"] == alone["choices"][0]["message"]
    assert gone_on["choices"] == client.post("/v1/completions", json=text).json()["choices"]
    for wrong in ({"prompt": "x"}, {"@requestFormat": "completions", "prompt": "x", "stream": True}):
        assert error_of(client.post("/predict", json={"instances": [wrong]}), 400)["param"] == "instances"
    wrong = {"@requestFormat": "completions", "prompt": "x", "temperature": -1}
    assert error_of(client.post("/predict", json={"instances": [wrong]}), 400)["param"] == "temperature"


def test_routes_that_are_switched_off(tiny_model: Path) -> None:
    with serving(("tiny", tiny_model), options=ServeOptions(without=("metrics", "slots", "page"))) as client:
        for path in ("/metrics", "/slots"):
            assert "--without" in error_of(client.get(path), 501)["message"]
        error_of(client.get("/"), 404)
        assert client.get("/health").status_code == 200
        assert events(client.post("/v1/completions", json={"prompt": "x", "max_tokens": 2, "stream": True}))
