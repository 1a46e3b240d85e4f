"""`kbit top` and `kbit launch` beside a real server."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import pytest
from command_cases import in_process
from serve_cases import PATIENCE, server

from kbit.cli.launch import CLIENTS
from kbit.cli.top import _compared


@pytest.fixture(scope="module")
def address(novels_folder: str) -> Iterator[str]:
    """Of a server with two models, of which one is loaded, and a key."""
    with server(f"novels={novels_folder}", f"other={novels_folder}", "--api-key", "right") as (_, address, _):
        yield address


def test_what_a_server_did(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    headers = {"Authorization": "Bearer right"}
    for _ in range(2):
        body = {"model": "novels", "prompt": "It was a dark night, and", "max_tokens": 5, "ignore_eos": True}
        httpx.post(f"{address}/v1/completions", json=body, headers=headers, timeout=PATIENCE).raise_for_status()
    code, out, error = in_process(["top", address, "--json", "--api-key", "right", "--interval", "0.1"], monkeypatch)
    assert (code, error) == (0, "")
    found = json.loads(out)
    assert (found["queued"], found["refused"]) == (0, 0)
    assert found["models"]["other"]["state"] == "unloaded"
    novels = found["models"]["novels"]
    assert (novels["state"], novels["running"], novels["answered"]) == ("ready", 0, 2)
    assert novels["first_token_s"] > 0
    monkeypatch.setenv("KBIT_API_KEY", "right")
    code, out, _ = in_process(["top", f"{address}/v1/", "--once", "--interval", "0.1"], monkeypatch)
    assert code == 0
    head, titles, *rows = out.splitlines()
    assert head.startswith(address)
    assert titles.split()[:2] == ["model", "state"]
    assert [row.split()[:5] for row in rows] == [
        ["novels", "ready", "0", "0", "2"],
        ["other", "unloaded", "0", "0", "0"],
    ]
    monkeypatch.setenv("KBIT_API_KEY", "wrong")
    code, _, error = in_process(["top", address, "--once"], monkeypatch)
    assert code == 1
    assert "401 Unauthorized: give its --api-key" in error


def test_rates_are_differences() -> None:
    def moment(time: float, tokens: float) -> dict[str, object]:
        samples = {("kbit:generation_tokens_total", "m"): tokens, ("kbit:prompt_tokens_total", "m"): 2 * tokens}
        return {"time": time, "models": {"m": "ready"}, "samples": samples}

    row = _compared(moment(10.0, 100.0), moment(12.5, 150.0))["models"]["m"]
    assert (row["generated_per_second"], row["prompt_per_second"]) == (20.0, 40.0)
    assert row["first_token_s"] is None
    row = _compared(moment(10.0, 100.0), moment(12.0, 0.0))["models"]["m"]  # started anew
    assert row["generated_per_second"] == 0.0


class Other(BaseHTTPRequestHandler):
    """Another program's server."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html>hello</html>")

    def log_message(self, *arguments: object) -> None:
        pass


def test_no_server_and_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with HTTPServer(("127.0.0.1", 0), Other) as other:
        address = f"http://127.0.0.1:{other.server_port}"
        threading.Thread(target=other.serve_forever, daemon=True).start()
        code, _, error = in_process(["top", address, "--once"], monkeypatch)
        other.shutdown()
        assert code == 1
        assert error.startswith(f"kbit: error: {address}: does not answer as kbit serve does (")
    code, _, error = in_process(["top", address, "--once"], monkeypatch)
    assert code == 1
    assert "nobody answers" in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("arguments", [["localhost:8080"], ["--interval", "0"]])
def test_wrong_usage(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, error = in_process(["top", *arguments], monkeypatch)
    assert code == 2
    assert "expected" in error


ASK = """
import json, os, urllib.request
headers = {"Authorization": "Bearer " + os.environ["OPENAI_API_KEY"]}
models = urllib.request.urlopen(urllib.request.Request(os.environ["OPENAI_BASE_URL"] + "/models", headers=headers))
print([each["id"] for each in json.load(models)["data"]])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no exec")
def test_a_program_is_told_where_the_server_is(address: str, tmp_path: Path) -> None:
    kbit = [sys.executable, "-m", "kbit", "launch", "--url", address, "--api-key", "right"]
    run = partial(subprocess.run, capture_output=True, text=True, timeout=PATIENCE, cwd=tmp_path)
    done = run([*kbit, "python", "--", "-c", ASK])
    assert (done.returncode, done.stdout) == (0, "['novels', 'other']\n"), done.stderr
    assert f"OPENAI_BASE_URL={address}/v1" in done.stderr
    assert "right" not in done.stderr  # the key is not shown
    script = run([*kbit, "shell", "--print"]).stdout + f"exec {sys.executable} -c '{ASK}'\n"
    assert run(["sh", "-c", script]).stdout == done.stdout


def test_what_would_be_started(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--url", f"{address}/v1", "--api-key", "right", "--print"]
    code, out, _ = in_process(["launch", "claude", *flags, "--model", "other", "--", "-p", "it's"], monkeypatch)
    assert code == 0
    *variables, command = out.splitlines()
    assert f"export ANTHROPIC_BASE_URL={address}" in variables
    assert "export ANTHROPIC_DEFAULT_HAIKU_MODEL=other" in variables
    assert shlex.split(command) == ["claude", "--model", "other", "-p", "it's"]
    for name, client in CLIENTS.items():
        code, out, error = in_process(["launch", name, *flags], monkeypatch)
        assert (code, error) == (0, "")
        assert "{" not in out
        assert all(f"export {variable}=" in out for variable in client.variables)
    assert in_process(["launch"], monkeypatch)[1].count("\n") == len(CLIENTS)


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (["emacs"], "emacs: kbit knows aider, claude", 2),
        (["aider", "--model", "gpt"], "--model gpt: the server at", 2),
        (["aider", "--api-key", "wrong"], "401 Unauthorized: give its --api-key", 1),
        (["aider"], "aider: is not on PATH: pip install aider-install", 1),
    ],
)
def test_what_cannot_be_started(
    address: str, arguments: list[str], message: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("KBIT_API_KEY", "right")
    found, out, error = in_process(["launch", *arguments, "--url", address], monkeypatch)
    assert (found, out) == (code, "")
    assert message in error
    assert len(error.splitlines()) == 1
