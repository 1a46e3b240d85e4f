"""Errors of `kbit` as a program in its own process: exit status, --debug, and broken standard output."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from error_cases import check_line

pytestmark = pytest.mark.usefixtures("no_network")


def program(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kbit.cli.main", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_exit_status_of_the_program(zoo: Path) -> None:
    for arguments, status in (
        (["info", "nowhere"], 2),
        (["info", str(zoo / "truncated")], 1),
        (["info", str(zoo / "good"), "--frobnicate"], 2),
    ):
        result = program(*arguments)
        assert result.returncode == status
        check_line(result.stdout, result.stderr)
    assert program("--version").returncode == 0
    assert program("info", str(zoo / "good")).returncode == 0


def test_debug_of_the_program(zoo: Path) -> None:
    for result in (
        program("info", str(zoo / "truncated"), "--debug"),
        program("info", str(zoo / "truncated"), KBIT_DEBUG="1"),
    ):
        assert result.returncode == 1
        assert result.stdout == ""
        assert "Traceback (most recent call last)" in result.stderr
        assert "CheckpointError" in result.stderr
        assert result.stderr.splitlines()[-1].startswith("kbit: error: ")


def test_no_command_shows_the_help() -> None:
    result = program()
    assert result.returncode == 2
    assert "Usage: kbit" in result.stdout + result.stderr


@pytest.mark.skipif(os.name == "nt", reason="no such pipes there")
@pytest.mark.parametrize("command", [("info", "--tensors"), ("run", "a", "--model")])
def test_a_reader_that_goes_away_is_no_error(zoo: Path, command: tuple[str, ...]) -> None:
    """Also with a model in memory: nothing is said of what the interpreter still holds at its end."""
    arguments = [sys.executable, "-m", "kbit.cli.main", *command, str(zoo / "good")]
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as pipe:
        result = subprocess.run(arguments, stdout=pipe, stderr=subprocess.PIPE, text=True, timeout=300)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_standard_output_on_a_full_disk(zoo: Path) -> None:
    with open("/dev/full", "w") as full:
        arguments = [sys.executable, "-m", "kbit.cli.main", "info", str(zoo / "good")]
        result = subprocess.run(arguments, stdout=full, stderr=subprocess.PIPE, text=True, timeout=300)
    assert result.returncode == 1
    assert "No space left on device; make room on the disk" in check_line("", result.stderr)
