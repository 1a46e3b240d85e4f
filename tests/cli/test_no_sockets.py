"""Nothing is sent anywhere unasked: with sockets forbidden everything works but pull, hub ids and serve.

In processes of their own, where any use of a socket (creating one, looking a name up) ends the process with a word:
Python's audit hooks see all of it, whatever library asks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# An exit code that nothing else has, and at once: whoever expects to be offline would swallow an exception.
FORBIDDEN = """
import os, sys

def forbid(event, arguments):
    if not event.startswith("socket.") or event == "socket.gethostname":
        return
    if event == "socket.__new__" and arguments[1] == 1:  # AF_UNIX: this machine's
        return
    os.write(2, f"FORBIDDEN: {event} {arguments!r}\\n".encode())
    os._exit(99)

sys.addaudithook(forbid)
"""
RUN = FORBIDDEN + "from kbit.cli.main import main; sys.argv = ['kbit', *sys.argv[1:]]; sys.exit(main())"


def kbit(*arguments: object, cache: Path, code: str = RUN) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "KBIT_CACHE": str(cache), "KBIT_PREPARED": str(cache), "KBIT_CALIBRATION": str(cache)}
    for offline in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        environment.pop(offline, None)  # it must not need to be told
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("It was the best of times, it was the worst of times. " * 40)
    return path


def test_the_guard_works(tmp_path: Path) -> None:
    for attempt in (
        "import socket; socket.socket()",
        "import socket; socket.getaddrinfo('localhost', 80)",
        "import urllib.request\ntry: urllib.request.urlopen('http://127.0.0.1:9')\nexcept Exception: pass",
    ):
        done = kbit(cache=tmp_path, code=FORBIDDEN + attempt)
        assert done.returncode == 99
        assert "FORBIDDEN: socket." in done.stderr


def test_commands(tmp_path: Path, tiny_model: Path, text: Path) -> None:
    """One process, since each start takes a second: convert, look, run, measure, export, plan."""
    out, plain, cache = tmp_path / "out", tmp_path / "plain", tmp_path / "cache"
    commands: list[list[Any]] = [
        ["quantize", tiny_model, "--method", "rtn", "-o", out],
        ["info", out],
        ["run", "Hello", "--raw", "--max-tokens", 4, "--model", out],
        ["eval", out, "--data", text, "--context", 32, "--max-tokens", 128],
        ["export", out, "-o", plain],
        ["pull", "--list"],
    ]
    code = FORBIDDEN + (
        "import json; from kbit.cli.main import _run\n"
        "for command in json.loads(sys.argv[1]):\n"
        "    code = _run(command, False)\n"
        "    assert code == 0, (command, code)\n"
    )
    done = kbit(json.dumps([[str(word) for word in command] for command in commands]), cache=cache, code=code)
    assert done.returncode == 0, done.stderr
    assert (plain / "model.safetensors").is_file()


def test_what_asks_for_the_network_is_seen(tmp_path: Path) -> None:
    """A hub id is the user's word for it."""
    done = kbit("info", "some-organisation/no-such-model", cache=tmp_path)
    assert done.returncode == 99
    assert "FORBIDDEN: socket." in done.stderr
