"""Who may use the server, what it says of itself, and how it refuses."""

from __future__ import annotations

import json
import re
import threading
import time
from base64 import b64encode
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from nested_cases import write_mixed
from prometheus_client.parser import text_string_to_metric_families
from serve_cases import PATIENCE, error_of, serving
from starlette.testclient import TestClient

from kbit.engine.batch_engine import BatchEngine
from kbit.engine.generate import generate
from kbit.engine.loader import load_model
from kbit.formats.nested import NestedFormat
from kbit.host.errors import KbitError
from kbit.serve.access import LOOPBACK
from kbit.serve.app import ServeOptions
from kbit.serve.run import listen

RIGHT = {"authorization": "Bearer right"}


def test_keys_hosts_origins_and_sizes(tiny_model: Path) -> None:
    options = ServeOptions(keys=["right", "other"], hosts=LOOPBACK, origins=["http://ui.local:3000"], most_bytes=1000)
    body: dict[str, Any] = {"prompt": "x", "max_tokens": 1}
    with serving(("tiny", tiny_model), options=options) as client:
        assert client.get("/health").status_code == 200
        assert client.get("/").status_code == 200
        for headers in ({}, {"authorization": "Bearer wrong"}, {"x-api-key": ""}, {"authorization": "Basic right"}):
            assert (
                error_of(client.post("/v1/completions", json=body, headers=headers), 401)["code"] == "invalid_api_key"
            )
        for headers in (RIGHT, {"x-api-key": "other"}):
            assert client.post("/v1/completions", json=body, headers=headers).status_code == 200
        assert (
            "answer to the name" in error_of(client.get("/health", headers={"host": "evil.example:80"}), 403)["message"]
        )
        for host in ("localhost", "127.0.0.1:8080", "[::1]:1"):
            assert client.get("/health", headers={"host": host}).status_code == 200
        foreign = {**RIGHT, "origin": "http://evil.example"}
        assert "--cors-origin" in error_of(client.post("/v1/completions", json=body, headers=foreign), 403)["message"]
        known = client.post("/v1/completions", json=body, headers={**RIGHT, "origin": "http://ui.local:3000"})
        assert known.headers["access-control-allow-origin"] == "http://ui.local:3000"
        own = client.post("/v1/completions", json=body, headers={**RIGHT, "origin": "http://localhost:8080"})
        assert own.status_code == 200
        assert "access-control-allow-origin" not in own.headers
        large = json.dumps({"prompt": "x" * 2000})
        typed = {**RIGHT, "content-type": "application/json"}
        assert (
            error_of(client.post("/v1/completions", content=large, headers=typed), 413)["code"] == "request_too_large"
        )
        pieces = iter([large[:900].encode(), large[900:].encode()])  # without a Content-Length
        error_of(client.post("/v1/completions", content=pieces, headers=typed), 413)


@pytest.fixture(scope="module")
def client(tiny_model: Path) -> Any:
    with serving(("tiny", tiny_model)) as client:
        yield client


def test_it_says_what_it_serves(client: TestClient) -> None:
    listed = client.get("/v1/models").json()
    assert [model["id"] for model in listed["data"]] == ["tiny"]
    assert client.get("/v1/models/tiny").json()["max_model_len"] == 64
    assert error_of(client.get("/v1/models/nothing/at/all"), 404)["code"] == "model_not_found"
    error = error_of(client.post("/v1/completions", json={"model": "gpt", "prompt": "x"}), 404)
    assert error["code"] == "model_not_found"
    assert "this server has tiny" in error["message"]
    props = client.get("/props").json()
    assert props["n_ctx"] == 64
    assert props["sampling_defaults"]["top_k"] == 40
    assert props["cache_bytes"] > 0
    slots, *others = client.get("/slots").json()
    assert [each["id"] for each in others] == list(range(1, 64))
    assert slots["cache_bytes"] > 0
    assert slots["weights_bytes"] > 0
    idle = {"model": "tiny", "running": 0, "waiting": 0, "requests": 0, "cache_used": 0, "is_processing": False}
    assert {name: slots[name] for name in idle} == idle


def test_several_addresses_have_one_port() -> None:
    sockets = listen("127.0.0.1,127.0.0.2", 0)
    first, second = (each.getsockname() for each in sockets)
    assert (first[0], second[0]) == ("127.0.0.1", "127.0.0.2")
    assert first[1] == second[1]
    with pytest.raises(KbitError, match=f"--host 127.0.0.2 --port {first[1]}: .*in use"):
        listen("127.0.0.2", first[1])
    for each in sockets:
        each.close()


def test_bodies_that_are_none(client: TestClient) -> None:
    typed = {"content-type": "application/json"}
    assert (
        error_of(client.post("/v1/completions", content=b'{"prompt": ', headers=typed), 400)["code"] == "invalid_json"
    )
    for content in (b"", b"[]", b"null", b"7", b"\xff\xfe"):
        error_of(client.post("/v1/chat/completions", content=content, headers=typed), 400)
    error_of(client.post("/v1/completions", content=b'{"prompt": "x"}', headers={"content-type": "text/plain"}), 400)
    error_of(client.get("/v1/completions"), 405)
    error_of(client.get("/v1/nothing"), 404)
    deep = b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}"
    error_of(client.post("/v1/completions", content=deep, headers=typed), 400)


def test_figures_are_prometheus_text(client: TestClient) -> None:
    assert client.post("/v1/completions", json={"prompt": "x", "max_tokens": 3, "ignore_eos": True}).status_code == 200
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    samples = {s.name: s.value for family in text_string_to_metric_families(response.text) for s in family.samples}
    assert samples["kbit:generation_tokens_total"] >= 3
    assert samples["kbit:request_success_total"] >= 1
    assert samples["kbit:num_requests_running"] == 0
    assert samples["kbit:time_to_first_token_seconds_count"] >= 1


def test_a_name_that_none_has(tiny_model: Path) -> None:
    with serving(("tiny", tiny_model), any_name=True) as client:
        answer = client.post("/v1/completions", json={"model": "gpt-5", "prompt": "x", "max_tokens": 1}).json()
        assert answer["model"] == "tiny"


def test_a_model_that_cannot_be_loaded(tiny_model: Path, tmp_path: Path) -> None:
    with serving(("tiny", tiny_model), ("gone", tmp_path / "gone")) as client:
        for _ in range(2):
            error = error_of(client.post("/v1/completions", json={"model": "gone", "prompt": "x"}), 400)
            assert "no such folder or file" in error["message"]
        assert client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200


def test_widths_are_models(novels_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KBIT_CACHE", str(tmp_path))
    with serving(("novels", Path(novels_folder)), ("novels:3", Path(f"{novels_folder}:3"))) as client:
        body = {"prompt": "It was", "max_tokens": 1, "temperature": 0, "logprobs": 5}
        whole, rounded = (
            client.post("/v1/completions", json={**body, "model": name}).json() for name in ("novels", "novels:3")
        )
        assert rounded["model"] == "novels:3"
        assert whole["choices"][0]["logprobs"] != rounded["choices"][0]["logprobs"]
        assert whole["system_fingerprint"] != rounded["system_fingerprint"]
        weights = [
            client.get("/props", params={"model": name}).json()["weights_bytes"] for name in ("novels", "novels:3")
        ]
        assert weights[1] < weights[0]


def test_widths_of_a_nested_file_are_read_from_it(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No folder of their own, and the answers of `kbit run --bits`; a width that it does not serve is said."""
    monkeypatch.setenv("KBIT_CACHE", str(tmp_path / "cache"))
    out = write_mixed(tiny_model, tmp_path / "all", NestedFormat(2, 5, 32))
    narrower = (("half", 3.5), ("three", 3), ("two", 2), ("six", 6))
    names = ("all", "half", "three", "two")
    with serving(("all", out), *((name, Path(f"{out}:{bits}")) for name, bits in narrower)) as client:
        body = {"prompt": [1, 2, 3, 4], "max_tokens": 6, "temperature": 0, "logprobs": 3}
        answers = [client.post("/v1/completions", json={**body, "model": name}).json() for name in names]
        weights = [client.get("/props", params={"model": name}).json()["weights_bytes"] for name in names]
        error = error_of(client.post("/v1/completions", json={**body, "model": "six"}), 400)
        assert "serves 2 to 5 bits; choose one of these" in error["message"]
    assert weights == sorted(weights, reverse=True)
    assert len(set(weights)) == 4
    assert len({answer["system_fingerprint"] for answer in answers}) == 4
    assert not (tmp_path / "cache" / "widths").exists()
    for answer, bits in zip(answers, (5, 3.5, 3, 2), strict=True):
        model = load_model(str(out), threads=1, bits=bits)
        run = generate(model.decoder, model.tokenizer, [1, 2, 3, 4], max_tokens=6).run()
        assert answer["choices"][0]["text"] == run.text


def test_the_queue_is_bounded(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ServeOptions(most_tokens=5)
    may_step, step = threading.Event(), BatchEngine.step
    monkeypatch.setattr(BatchEngine, "step", lambda engine: step(engine) if may_step.wait() else [])
    with serving(("tiny", tiny_model), options=options) as client:
        prompts = [[1] * 5, [2] * 5, [3] * 5]
        response = client.post("/v1/completions", json={"prompt": prompts, "max_tokens": 2})
        may_step.set()
        error = error_of(response, 429)
        assert error["code"] == "queue_full"
        assert 1 <= int(response.headers["retry-after"]) <= 60
        assert "kbit:admission_rejections_total 0.0" not in client.get("/metrics").text
        deadline = time.monotonic() + PATIENCE
        while "kbit:num_requests_queued 0.0" not in client.get("/metrics").text:  # those that came with the refused one
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert client.post("/v1/completions", json={"prompt": [1] * 5, "max_tokens": 2}).status_code == 200


def test_the_page_needs_nothing_from_elsewhere(client: TestClient) -> None:
    response = client.get("/")
    assert response.headers["content-type"].startswith("text/html")
    parts = re.fullmatch(r"(.*)<style>(.*)</style>(.*)<script>(.*)</script>.*", response.text, re.DOTALL)
    assert parts is not None
    head, style, body, script = parts.groups()
    assert "<script" not in head + body
    # What runs is what the policy names by its hash, and nothing else.
    policy = dict(part.strip().split(" ", 1) for part in response.headers["content-security-policy"].split(";"))
    for kind, content in (("script-src", script), ("style-src", style)):
        assert policy[kind] == f"'sha256-{b64encode(sha256(content.encode()).digest()).decode()}'"
    assert policy["default-src"] == policy["frame-ancestors"] == policy["form-action"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert not re.findall(r"(?:src|href|style)\s*=\s*[\"']|@import|https?:|url\(|innerHTML|eval\(", response.text)
    assert not re.findall(r"\son\w+=", response.text)
    routes = set(re.findall(r'(?:fetch|get)\("(/[^"]+)"', response.text))
    assert routes == {"/v1/models", "/slots", "/v1/chat/completions"}
    for route in routes:
        assert client.get(route).status_code in (200, 405)
