"""`kbit completion`: what the shells themselves make of the scripts."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from command_cases import in_process

from kbit.cli.main import COMMANDS

LINES = [
    ("kbit tra", {"transcribe", "translate"}),
    ("kbit bench --rep", {"--repeats"}),
    ("kbit run --backend re", {"reference"}),
    ("kbit chat --model ou", {"out"}),
    ("kbit completion z", {"zsh"}),
]


@pytest.fixture(scope="module")
def script(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The script for a shell, in a folder with a folder out/."""
    with pytest.MonkeyPatch.context() as patch:
        code, out, error = in_process(["completion", request.param], patch)
    assert (code, error) == (0, "")
    folder = tmp_path_factory.mktemp("completion")
    (folder / "out").mkdir()
    file = folder / "script"
    file.write_text(out)
    return file


def shell(name: str, program: str, folder: Path) -> set[str]:
    if shutil.which(name) is None:
        pytest.skip(f"no {name} here")
    flags = {"bash": ["--norc"], "zsh": ["-f"], "fish": ["--no-config"]}[name]
    done = subprocess.run([name, *flags, "-c", program], capture_output=True, text=True, cwd=folder, timeout=60)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return {line.split("\t")[0].rstrip("/ ") for line in done.stdout.splitlines()}


@pytest.mark.parametrize("script", ["bash"], indirect=True)
@pytest.mark.parametrize(("line", "expected"), LINES)
def test_bash(script: Path, line: str, expected: set[str]) -> None:
    words = " ".join(f"'{word}'" for word in line.split())
    program = f"""
        source ./script
        COMP_WORDS=({words}) COMP_CWORD={len(line.split()) - 1}
        compopt() {{ :; }}
        $(complete -p kbit | sed 's/.*-F \\([^ ]*\\).*/\\1/') kbit "${{COMP_WORDS[-1]}}" "${{COMP_WORDS[-2]}}"
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    assert shell("bash", program, script.parent) == expected


@pytest.mark.parametrize("script", ["fish"], indirect=True)
@pytest.mark.parametrize(("line", "expected"), LINES)
def test_fish(script: Path, line: str, expected: set[str]) -> None:
    assert shell("fish", f"source ./script; complete -C '{line}'", script.parent) == expected


@pytest.mark.parametrize("script", ["zsh"], indirect=True)
def test_zsh_takes_the_script(script: Path) -> None:
    assert "#compdef kbit" in script.read_text()
    shell("zsh", "zsh -n ./script", script.parent)


@pytest.mark.parametrize("script", ["bash"], indirect=True)
def test_every_command_is_in_it(script: Path) -> None:
    text = script.read_text()
    assert all(f"_shtab_kbit_{name.replace('-', '_')}_option_strings=" in text for name in COMMANDS)


def test_another_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, error = in_process(["completion", "tcsh"], monkeypatch)
    assert code == 2
    assert error == "kbit: error: completion tcsh: expected bash, zsh, fish\n"
