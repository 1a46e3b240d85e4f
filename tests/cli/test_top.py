"""`kbit top` beside a real server."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
import pytest
from command_cases import in_process
from serve_cases import PATIENCE, server

from kbit.cli.top import _compared


def test_what_a_server_did(novels_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with server(f"novels={novels_folder}", f"other={novels_folder}", "--api-key", "right") as (_, address, _):
        headers = {"Authorization": "Bearer right"}
        for _ in range(2):
            body = {"model": "novels", "prompt": "It was a dark night, and", "max_tokens": 5, "ignore_eos": True}
            httpx.post(f"{address}/v1/completions", json=body, headers=headers, timeout=PATIENCE).raise_for_status()
        code, out, error = in_process(
            ["top", address, "--json", "--api-key", "right", "--interval", "0.1"], monkeypatch
        )
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
