"""A model that does not fit what a limit leaves is refused before its weights are read, with the number; one that does
runs."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from error_cases import run_command
from serve_cases import with_template

from kbit.host.errors import KbitError
from kbit.host.memory import Room
from kbit.models.opening import open_model
from kbit.planner import fits

if sys.platform != "linux":
    pytest.skip("limits of address space are Linux's", allow_module_level=True)


def run(model: str, kilobytes: int, folder: Path) -> subprocess.CompletedProcess[str]:
    """`kbit run` under `ulimit -v`."""
    command = f'ulimit -v {kilobytes}; exec "$0" -m kbit run --raw "The old" --model "$1" --max-tokens 8 --threads 4'
    environment = {"KBIT_PREPARED": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["bash", "-c", command, sys.executable, model],
        capture_output=True, text=True, check=False, env={**os.environ, **environment},
    )  # fmt: skip


def test_under_a_limit_it_runs_or_refuses(novels_folder: str, tmp_path: Path) -> None:
    """With 5 % more than it says it needs it runs; with 20 % less it refuses, and has prepared nothing."""
    refused = run(novels_folder, 350_000, tmp_path)
    found = re.search(r"needs (\d+) bytes .* ulimit -v allows 358400000 ", refused.stderr)
    assert refused.returncode == 1
    assert found is not None, refused.stderr
    assert not list(tmp_path.iterdir())
    needed = int(found[1])
    less = run(novels_folder, int(0.8 * needed) // 1024, tmp_path)
    assert (less.returncode, less.stdout) == (1, "")
    assert f"needs {needed // 10_000_000}" in less.stderr
    assert "raise the limit" in less.stderr
    enough = run(novels_folder, int(1.05 * needed) // 1024, tmp_path)
    assert enough.returncode == 0, enough.stderr
    assert run(novels_folder, int(1.05 * needed) // 1024, tmp_path).stdout == enough.stdout  # from prepared weights


def test_what_counts(novels_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A control group's memory counts weights and cache; address space, threads too. Fewer tokens are a remedy only where
    they would do."""
    wanted = fits.Wanted(context=4096, prompt=64)
    with open_model(novels_folder) as source:

        def refusal(room: int, **changes: bool) -> str | None:
            monkeypatch.setattr(fits, "limits", lambda: [Room(room, 1 << 40, "some limit", **changes)])
            try:
                fits.refuse_what_does_not_fit(source, wanted, "it")
            except KbitError as error:
                return str(error)
            return None

        least = next(room for room in range(1 << 20, 1 << 28, 1 << 20) if refusal(room) is None)
        assert 5 << 20 < least < 64 << 20
        assert "or ask for fewer tokens: their keys and values take" in str(refusal(least - (2 << 20)))
        assert "fewer tokens" not in str(refusal(0))
        assert refusal(least, mapped=True) is not None
        assert refusal(least + fits.THREAD_ADDRESSES, mapped=True) is None
        monkeypatch.setattr(fits, "limits", list)
        fits.refuse_what_does_not_fit(source, wanted, "it")


def test_every_command_that_loads_a_model_asks(
    novels_folder: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chats, encoders (a decoder read as one, too) and trellis folders: with 20 % less than what is missing nothing is
    prepared; with 5 % more the answer comes."""
    monkeypatch.setenv("KBIT_PREPARED", str(tmp_path / "prepared"))
    chatty, trellis = with_template(Path(novels_folder), tmp_path / "chatty"), tmp_path / "trellis"
    made = run_command(["quantize", str(tiny_model), "--method", "rtn", "--format", "trellis3", "-o", str(trellis)])
    assert made[0] == 0, made
    few = ("--max-tokens", "4", "--threads", "1")
    commands = [
        ["chat", "--model", str(chatty), *few],
        ["embed", "a man", "--model", novels_folder, "--pooling", "mean", "--threads", "1"],
        ["run", "--raw", "a", "--model", str(trellis), *few],
    ]

    def under(room: int, command: list[str]) -> tuple[int, str, str]:
        monkeypatch.setattr(fits, "limits", lambda: [Room(room, 1 << 30, "some limit")])
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Hello\n")))
        return run_command(command)

    for command in commands:
        code, out, error = under(1, command)
        found = re.search(r"needs (\d+) bytes", error)
        assert (code, out) == (1, ""), error
        assert found is not None, error
        more = int(found[1]) - (1 << 30) + 1  # beyond what this process has
        code, out, error = under(int(0.8 * more), command)
        assert (code, out) == (1, ""), error
        assert not list((tmp_path / "prepared").rglob("*.kbit"))
        code, out, error = under(int(1.05 * more), command)
        assert code == 0, error
        assert out
        shutil.rmtree(tmp_path / "prepared", ignore_errors=True)
