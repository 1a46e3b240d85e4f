"""The command's frame: interruption, help, `python -m kbit`, a prompt from a pipe, a checkout in the way."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kbit.cli.main import _on_interrupt, _run

REPOSITORY = Path(__file__).resolve().parents[2]


def python(*arguments: str, cwd: Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], input=stdin, capture_output=True, text=True, cwd=cwd, check=False, timeout=300
    )


def test_interrupt_in_a_command_can_be_caught() -> None:
    with pytest.raises(KeyboardInterrupt):
        _on_interrupt(2, sys._getframe())


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to send to oneself")
def test_interrupt_during_an_import_ends_the_process(tmp_path: Path) -> None:
    """Extension modules must not see an exception while they initialise."""
    (tmp_path / "heavy.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nprint('swallowed')\n")
    code = (
        "import signal, sys; from kbit.cli.main import _on_interrupt\n"
        "signal.signal(signal.SIGINT, _on_interrupt)\nsys.path.insert(0, '.')\n"
        "try:\n    import heavy\nexcept BaseException:\n    print('unwound')\n"
    )
    result = python("-c", code, cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr.strip()) == (130, "", "kbit: interrupted")


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["run", "-h"], ["--version"]])
def test_help_and_version(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(arguments, debug=True) == 0
    assert "kbit" in capsys.readouterr().out


def test_module(tmp_path: Path) -> None:
    result = python("-m", "kbit", "--version", cwd=tmp_path)
    assert result.returncode == 0
    assert result.stdout.startswith("kbit ")


def test_prompt_from_a_pipe(tmp_path: Path, tiny_model: Path) -> None:
    arguments = ["-m", "kbit", "run", "--model", str(tiny_model), "--max-tokens", "1", "--json"]
    assert python(*arguments, cwd=tmp_path, stdin="Hello there\n").returncode == 0
    result = python(*arguments, cwd=tmp_path, stdin="")
    assert result.returncode == 2
    assert result.stderr.startswith("kbit: error: the prompt from standard input is empty")


class TestInsideACheckout:
    """Python started in a checkout finds its kbit/ first, which lacks the compiled module and kbit.kernels."""

    @pytest.fixture
    def checkout(self, tmp_path: Path) -> Path:
        shutil.copytree(
            REPOSITORY / "kbit", tmp_path / "kbit", ignore=shutil.ignore_patterns("*.so", "*.pyd", "kernels")
        )
        return tmp_path

    def test_the_installed_package_runs(self, checkout: Path, tiny_model: Path) -> None:
        assert python("-c", "import kbit.formats.planes, kbit.kernels.reference", cwd=checkout).returncode == 0
        result = python("-m", "kbit", "run", "Hello", "--model", str(tiny_model), "--max-tokens", "1", cwd=checkout)
        assert result.returncode == 0, result.stderr

    def test_without_one_a_line_says_what_to_do(self, checkout: Path) -> None:
        # -E -S: without the packages of the environment, the installed one among them.
        torch_folder = Path(__import__("torch").__file__).parent.parent
        only_torch = checkout / "packages"
        only_torch.mkdir()
        for entry in torch_folder.iterdir():
            if not entry.name.startswith(("kbit", "_kbit")):
                (only_torch / entry.name).symlink_to(entry)
        code = f"import sys; sys.path.append({str(only_torch)!r}); import kbit.backends.cpu.backend"
        result = python("-E", "-S", "-c", code, cwd=checkout)
        assert result.returncode != 0
        assert "pip install ." in result.stderr
