"""`kbit serve` as a process: what it says, who leaves, how it ends."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from serve_cases import PATIENCE, server


def until_idle(address: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while any(model["requests"] for model in httpx.get(f"{address}/slots").json()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_who_leaves_frees_the_seat_and_an_end_is_orderly(novels_folder: str) -> None:
    with server(f"novels={novels_folder}") as (process, address, said):
        curl = next(line for line in said if "curl" in line)
        body = re.search(r"-d '(.*)'", curl)
        assert body is not None
        answer = httpx.post(f"{address}/v1/completions", json=json.loads(body[1]), timeout=PATIENCE)
        assert answer.status_code == 200
        long = {"prompt": "It was", "max_tokens": 250, "ignore_eos": True, "n": 64, "stream": True}
        with httpx.stream("POST", f"{address}/v1/completions", json=long, timeout=PATIENCE) as response:
            next(response.iter_lines())
        # (How soon depends on the machine: tests/engine/test_engine_thread.py has a cancel felt within a step.)
        until_idle(address)
        soon = httpx.Timeout(PATIENCE, read=0.01)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{address}/v1/completions", json={**long, "stream": False}, timeout=soon)
        until_idle(address)
        # A text under way is finished after Ctrl-C; a new one is refused or not even connected.
        with httpx.stream("POST", f"{address}/v1/completions", json={**long, "n": 8}, timeout=PATIENCE) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGINT)
            assert process.stderr is not None
            assert "finishing 1 request; Ctrl-C again quits" in process.stderr.readline()
            with pytest.raises(httpx.HTTPError):
                httpx.post(f"{address}/v1/completions", json={"prompt": "x"}, timeout=PATIENCE).raise_for_status()
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert process.wait(PATIENCE) == 0


def test_sigterm_is_an_orderly_end_too(novels_folder: str) -> None:
    """As systemd and containers ask for one: answers under way are finished."""
    with server(f"novels={novels_folder}") as (process, address, _):
        body = {"prompt": "It was", "max_tokens": 200, "ignore_eos": True, "n": 8, "stream": True}
        with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=PATIENCE) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert process.wait(PATIENCE) == -signal.SIGTERM


def test_a_second_ctrl_c_quits(novels_folder: str) -> None:
    with server(f"novels={novels_folder}") as (process, address, _):
        long = {"prompt": "It was", "max_tokens": 250, "ignore_eos": True, "n": 128, "stream": True}
        with httpx.stream("POST", f"{address}/v1/completions", json=long, timeout=PATIENCE) as response:
            lines = response.iter_lines()  # (to let go of it is to leave)
            next(lines)
            process.send_signal(signal.SIGINT)
            assert process.stderr is not None
            assert "finishing" in process.stderr.readline()
            process.send_signal(signal.SIGINT)
            assert process.wait(PATIENCE) == 130


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "70000"], "--port 70000: expected"),
        (["--parallel", "0"], "--parallel 0: expected at least 1"),
        (["--without", "pages"], "--without pages: expected one of metrics, slots, page"),
        (["--chat-template-kwargs", "[1]"], "--chat-template-kwargs [1]: expected an object"),
        (["--cache-size", "much"], "--cache-size much: expected a size"),
        (["--tls-cert", "x.pem"], "belong together"),
        (["a/x.gguf", "b/x.gguf"], "two models have this name"),
        (["nothing-there"], "nothing-there: no such folder or file"),
    ],
)
def test_wrong_usage_is_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "kbit", "serve", *([] if "--port" in arguments else ["--port", "0"]), *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        cwd=tmp_path,
    )
    assert result.returncode == 2
    assert message in result.stderr.splitlines()[-1]
