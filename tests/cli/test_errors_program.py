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


@pytest.mark.skipif(os.name == "nt", reason="no such pipes there")
def test_a_table_whose_reader_goes_away_is_no_error() -> None:
    """Tables are rich's, which ends the program by itself."""
    arguments = [sys.executable, "-m", "kbit.cli.main", "plan", "--memory", "64MiB", "--no-speed"]
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as pipe:
        result = subprocess.run(arguments, stdout=pipe, stderr=subprocess.PIPE, text=True, timeout=300)
    assert (result.returncode, "BrokenPipe" in result.stderr) == (0, False)


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell")
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
def test_streams_that_are_closed(zoo: Path, tmp_path: Path, closed: str) -> None:
    """The command does its work, and none of its files gets the number of a stream."""
    command = f'"$@" {closed}'
    for arguments, status in (
        (["info", str(zoo / "good")], 0),
        (["info", str(zoo / "truncated")], 1),
        (["quantize", str(zoo / "good"), "--method", "rtn", "-o", str(tmp_path / "out")], 0),
    ):
        full = [sys.executable, "-m", "kbit.cli.main", *arguments]
        result = subprocess.run(["sh", "-c", command, "sh", *full], capture_output=True, text=True, timeout=300)
        assert result.returncode == status, result.stderr
        assert "Traceback" not in result.stderr
        if status == 0 and ">" not in closed:
            assert result.stdout
    for file in (tmp_path / "out").iterdir():
        assert file.read_bytes() == (zoo / "done" / file.name).read_bytes()


NO_PASSWORD_ENTRY = """
import os, pwd, sys

def missing(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")

pwd.getpwuid = missing
from kbit.cli.main import main
main()
"""


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["info", "org/name"], ("there is no home folder", "set HF_HOME to a folder")),
        (["run", "Hi"], ("there is no home folder", "set KBIT_CACHE to a folder")),
        (["pull", "smollm2-135m-instruct"], ("there is no home folder", "set KBIT_CACHE to a folder")),
        (["eval", "{good}", "--data", "~/text.txt"], ("--data '~/text.txt'",)),
        (["info", "{good}"], ()),
        (["run", "Hi", "-m", "{good}", "--max-tokens", "1"], ()),
        (["plan", "--memory", "1GiB", "--no-speed"], ()),
    ],
)
def test_a_user_without_a_home(zoo: Path, tmp_path: Path, arguments: list[str], fragments: tuple[str, ...]) -> None:
    """As in containers that run under any user id: no HOME, and no entry in the list of users."""
    names = ("HOME", "KBIT_CACHE", "XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "KBIT_PREPARED", "KBIT_CALIBRATION")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    words = [word.replace("{good}", str(zoo / "good")) for word in arguments]
    full = [sys.executable, "-c", NO_PASSWORD_ENTRY, *words]
    result = subprocess.run(full, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    if fragments:
        line = check_line(result.stdout, result.stderr)
        assert all(fragment in line for fragment in fragments)
    else:
        assert result.returncode == 0, result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_standard_output_on_a_full_disk(zoo: Path) -> None:
    with open("/dev/full", "w") as full:
        arguments = [sys.executable, "-m", "kbit.cli.main", "info", str(zoo / "good")]
        result = subprocess.run(arguments, stdout=full, stderr=subprocess.PIPE, text=True, timeout=300)
    assert result.returncode == 1
    assert "No space left on device; make room on the disk" in check_line("", result.stderr)
