"""LoRA adapters served as models of their own: over HTTP, on the command line and in a program, the same answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from adapter_cases import shapes_of, some, write_adapter
from error_cases import run_command
from serve_cases import serving, with_template
from starlette.testclient import TestClient

import kbit
from kbit.host.errors import UsageError
from kbit.serve.models import served_adapter

PROMPT = "It was a dark night, and"
NAMES = ("novels", "poet", "clerk")


@pytest.fixture(scope="module")
def base(novels_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_template(Path(novels_folder), tmp_path_factory.mktemp("served") / "novels")


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, shapes = tmp_path_factory.mktemp("served-adapters"), shapes_of(base)
    found = {
        "poet": write_adapter(folder / "poet", base, shapes, 4, size=0.3),
        "clerk": write_adapter(folder / "clerk", base, some(shapes, ("q_proj", "v_proj")), 2, size=0.5, seed=2),
    }
    template = "{% for m in messages %}{{ m.role + ' says: ' + m.content + '\n' }}{% endfor %}"
    (found["poet"] / "chat_template.jinja").write_text(template)
    return found


@pytest.fixture(scope="module")
def client(base: Path, adapters: dict[str, Path]) -> Iterator[TestClient]:
    with serving(("novels", base), adapters=adapters) as client:
        yield client


def ask(client: TestClient, route: str, name: str, **body: Any) -> dict[str, Any]:
    response = client.post(f"/v1/{route}", json={"model": name, "max_tokens": 20, "seed": 3, **body})
    assert response.status_code == 200, response.text
    return dict(response.json())


def test_each_is_a_model_on_shared_weights(client: TestClient) -> None:
    listed = {model["id"]: model["state"] for model in client.get("/v1/models").json()["data"]}
    assert listed == dict.fromkeys(NAMES, "ready")
    answers = {name: ask(client, "completions", name, prompt=PROMPT, temperature=0) for name in NAMES}
    assert [answer["model"] for answer in answers.values()] == list(NAMES)
    assert len({answer["choices"][0]["text"] for answer in answers.values()}) == 3
    assert len({answer["system_fingerprint"] for answer in answers.values()}) == 3
    assert {slot["model"] for slot in client.get("/slots").json()} == {"novels"}
    assert client.get("/metrics").text.count("kbit:num_requests_running{") == 1
    assert client.post("/v1/completions", json={"model": "bard", "prompt": "a"}).status_code == 404


def test_together_they_answer_as_alone(client: TestClient) -> None:
    bodies = [
        {"name": name, "prompt": PROMPT * (1 + index), "temperature": temperature}
        for index in range(3) for name in NAMES for temperature in (0, 0.9)
    ]  # fmt: skip
    alone = [ask(client, "completions", **body)["choices"] for body in bodies]
    with ThreadPoolExecutor(len(bodies)) as pool:
        together = list(pool.map(lambda body: ask(client, "completions", **body)["choices"], bodies))
    assert together == alone


def test_commands_and_programs_say_the_same(client: TestClient, base: Path, adapters: dict[str, Path]) -> None:
    folders: dict[str, Any] = dict(adapters)
    with kbit.load(base, threads=1, adapters=folders) as model:
        for name, folder in adapters.items():
            text = ask(client, "completions", name, prompt=PROMPT, temperature=0)["choices"][0]["text"]
            flags = ["run", "--raw", PROMPT, "--model", str(base), "--adapter", str(folder), "--max-tokens", "20"]
            code, out, error = run_command([*flags, "--threads", "1", "--json"])
            assert code == 0, error
            assert json.loads(out)["text"] == text
            assert model.generate(PROMPT, max_tokens=20, adapter=name).text == text
        messages = [{"role": "user", "content": "Who are you?"}]
        chats = [ask(client, "chat/completions", name, messages=messages, temperature=0) for name in NAMES]
        said = [chat["choices"][0]["message"]["content"] for chat in chats]
        assert model.chat("Who are you?", max_tokens=20).text == said[0]
        assert model.chat("Who are you?", max_tokens=20, adapter="poet").text == said[1]
        assert (
            chats[1]["usage"]["prompt_tokens"]
            != chats[0]["usage"]["prompt_tokens"]
            == chats[2]["usage"]["prompt_tokens"]
        )
        with pytest.raises(UsageError, match="there is no adapter 'bard': this model was loaded with poet, clerk"):
            model.generate(PROMPT, adapter="bard")


def test_what_the_command_refuses(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    assert served_adapter("poet=some/folder") == ("poet", "some/folder")
    for words, message in (
        (["serve", str(base), "--adapter", "poet"], "--adapter poet: write NAME=FOLDER"),
        (["serve", str(base), "--adapter", f"novels={adapters['poet']}"], "two models have this name"),
        (["serve", str(base), "--adapter", f"poet={tmp_path}"], "no LoRA adapter: name a folder with"),
        (["run", "a", "--model", str(base), "--adapter", str(tmp_path)], "no LoRA adapter: name a folder with"),
        (["run", "a", "--model", str(base), "--adapter", str(base)], "no LoRA adapter: name a folder with"),
    ):
        code, _, error = run_command(words)
        assert code == 2
        assert message in error
        assert error.count("\n") == 1
