"""tools/wheel_check.py sees what is wrong with a wheel. Building and installing one is the tool's own work."""

from __future__ import annotations

import os
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

import wheel_check  # noqa: E402

MODULE = "kbit/_native.cpython-311-x86_64-linux-gnu.so"


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, bytes]], Path]:
    """Writes a wheel with some files beside those of the package, which are two."""
    package = {"kbit/__init__.py", "kbit/serve/page.js"}
    monkeypatch.setattr(wheel_check, "package_files", lambda: package)

    def make(more: dict[str, bytes]) -> Path:
        file = tmp_path / "kbit-0-py3-none-any.whl"
        with zipfile.ZipFile(file, "w") as archive:
            for name, data in {**dict.fromkeys(package, b"x"), MODULE: b"ELF", **more}.items():
                if data != b"absent":
                    archive.writestr(name, data)
        return file

    return make


def test_a_good_one(write: Callable[[dict[str, bytes]], Path]) -> None:
    assert wheel_check.look_into(write({"kbit-0.dist-info/RECORD": b""})) == []


@pytest.mark.parametrize(
    ("more", "wrong"),
    [
        ({"kbit/serve/page.js": b"absent"}, "missing: ['kbit/serve/page.js']"),
        ({MODULE: b"absent"}, "compiled modules: []"),
        ({"kbit/kernels/cpu/a.cpp": b"int x;"}, "belong to building only: ['kbit/kernels/cpu/a.cpp']"),
        ({MODULE: b"\0" + os.fsencode(wheel_check.REPOSITORY) + b"/kernels/cpu/x.h\0"}, f"{MODULE} names "),
    ],
)
def test_a_bad_one(write: Callable[[dict[str, bytes]], Path], more: dict[str, bytes], wrong: str) -> None:
    found = wheel_check.look_into(write(more))
    assert found[0].startswith(wrong)


def test_what_belongs_into_it() -> None:
    if not (wheel_check.REPOSITORY / ".git").exists():
        pytest.skip("no git checkout, so which files are the package's is not known")
    files = wheel_check.package_files()
    assert {"kbit/serve/page.html", "kbit/serve/page.js", "kbit/cli/main.py", "kbit/kernels/reference.py"} <= files
    assert not any(file.endswith((".cpp", ".h")) for file in files)
