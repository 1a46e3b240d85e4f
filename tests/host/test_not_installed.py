"""A checkout that nobody installed says what to do."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import kbit


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python files only, as git has them."""
    folder = tmp_path_factory.mktemp("checkout")
    source = Path(str(kbit.__file__)).parent
    (folder / "kbit").mkdir()
    shutil.copy(source / "__init__.py", folder / "kbit")
    return folder


@pytest.mark.parametrize(
    "statement", ["import kbit._native", "from kbit import _native", "import kbit.kernels.reference"]
)
def test_one_line_says_what_to_do(checkout: Path, statement: str) -> None:
    code = f"import sys; sys.path.insert(0, {str(checkout)!r}); import kbit; print(kbit.__version__)\n{statement}"
    result = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.strip() == kbit.__version__
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ImportError: kbit was imported from {checkout / 'kbit'}, where it is")
    assert "pip install ." in last


def test_the_command_line_takes_it_for_no_bug() -> None:
    from kbit.cli import main

    error = ImportError("kbit is not installed: run pip install .", name="kbit.kernels")
    assert main._explain(error) == ("kbit: error: kbit is not installed: run pip install .", 1)
    assert "this is a bug" in main._explain(ImportError("no", name="numpy"))[0]
