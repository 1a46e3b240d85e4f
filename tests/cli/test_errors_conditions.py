"""Errors that no command line alone brings about: bad standard input, full disks, interrupts, exceptions, odd configs."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from error_cases import Q, check_line, edit_config, run_command, split

from kbit.cli import main as cli

pytestmark = pytest.mark.usefixtures("no_network")


@pytest.mark.parametrize(
    ("data", "fragments"),
    [
        (b"", ("from standard input is empty",)),
        (b" \n\t\n", ("from standard input is empty",)),
        (b"caf\xe9", ("standard input is not UTF-8 at byte 3",)),
        (b"y" * 1000, ("1000 tokens", "shorten the prompt")),
    ],
)
def test_prompts_from_standard_input(
    zoo: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, fragments: tuple[str, ...]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    code, stdout, stderr = run_command(["run", "-", "-m", str(zoo / "good")])
    line = check_line(stdout, stderr)
    assert code == 2
    assert all(fragment in line for fragment in fragments)


def test_a_prompt_that_was_not_utf8(zoo: Path) -> None:
    """Python hands bytes it cannot decode over as lone surrogates."""
    code, stdout, stderr = run_command(["run", "caf\udce9", "-m", str(zoo / "good")])
    assert code == 2
    assert "the prompt is not valid UTF-8" in check_line(stdout, stderr)


def test_disk_full(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage(NamedTuple):
        total: int
        used: int
        free: int

    arguments = split(Q, zoo, tmp_path / "new")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9, 0))
        for extra in ([], ["--dry-run"]):
            code, stdout, stderr = run_command([*arguments, *extra])
            assert code == 1
            assert "are free; make room or choose another --output" in check_line(stdout, stderr)
            assert list(tmp_path.iterdir()) == []  # refused before anything was made

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        code, stdout, stderr = run_command([*arguments, "--method", "rtn"])
        assert code == 1
        assert "new.partial: the disk is full; make room and run the same command again" in check_line(stdout, stderr)
    assert run_command([*arguments, "--method", "rtn"])[0] == 0


def test_an_interrupted_run_of_other_settings(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    plain = Q + "--method rtn "
    with monkeypatch.context() as patch:
        patch.setattr("kbit.quantizers.convert._write_kept", interrupt)
        code, stdout, stderr = run_command(split(plain, zoo, tmp_path / "new"))
        assert (code, stdout, stderr) == (130, "", "\nkbit: interrupted\n")
    code, stdout, stderr = run_command(split(plain + "--bits 3", zoo, tmp_path / "new"))
    assert code == 2
    assert "new.partial: an interrupted run with another source or other settings" in check_line(stdout, stderr)
    assert run_command(split(plain + "--bits 3 --no-resume", zoo, tmp_path / "new"))[0] == 0


@pytest.mark.parametrize(
    ("error", "line", "code"),
    [
        (MemoryError(), "kbit: error: out of memory", 1),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"),
            "kbit: error: out of memory",
            1,
        ),
        (PermissionError(13, "Permission denied", "x.txt"), "kbit: error: x.txt: Permission denied; check its", 1),
        (OSError(28, "No space left on device"), "No space left on device; make room on the disk", 1),
        (
            ZeroDivisionError("division by zero"),
            "kbit: internal error: ZeroDivisionError: division by zero; this is",
            1,
        ),
        (ValueError("x" * 100_000), f"kbit: internal error: ValueError: {'x' * 900}", 1),
        (ValueError("two\nlines \x1b[2J"), "kbit: internal error: ValueError: two lines ?[2J; this is a bug", 1),
    ],
)
def test_errors_of_other_kinds(monkeypatch: pytest.MonkeyPatch, error: Exception, line: str, code: int) -> None:
    def fail(model: str) -> None:
        raise error

    monkeypatch.setattr("kbit.checkpoint.resolve.open_model", fail)
    found, stdout, stderr = run_command(["info", "x"])
    assert (found, stdout, len(stderr.splitlines())) == (code, "", 1)
    assert line in stderr
    assert len(stderr) < 1200


def test_debug_shows_the_traceback_wherever_it_stands(zoo: Path) -> None:
    code, _, stderr = run_command(["info", "nowhere"], debug=True)
    assert code == 2
    assert "Traceback" in stderr
    assert stderr.splitlines()[-1].startswith("kbit: error: nowhere")
    assert cli._take_debug(["info", "--debug", "x"]) == (["info", "x"], True)
    assert cli._take_debug(["run", "--", "--debug"]) == (["run", "--", "--debug"], False)


def test_info_survives_any_config(zoo: Path, tmp_path: Path) -> None:
    """info does not need to understand a model: whatever its config says is shown, and cannot harm the terminal."""
    values: tuple[Any, ...] = (None, 3, "", "x" * 10_000, [], [None], {}, {"a": 1}, "\x1b[2J\ud800", 1e999, True)
    keys = ("architectures", "model_type", "num_attention_heads", "num_key_value_heads", "vocab_size", "hidden_size")
    model = tmp_path / "model"
    shutil.copytree(zoo / "good", model)
    for value in values:
        edit_config(model, **dict.fromkeys((*keys, "tie_word_embeddings", "max_position_embeddings"), value))
        code, stdout, stderr = run_command(["info", str(model)])
        assert (code, stderr) == (0, ""), value
        assert all(line.isprintable() for line in stdout.splitlines())
        code, stdout, stderr = run_command(["info", str(model), "--json"])
        assert (code, stderr) == (0, ""), value
        assert json.loads(stdout)["parameters"] > 0
