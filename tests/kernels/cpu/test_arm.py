"""The kernels for Arm, compiled by Debian's cross-compiler and run under qemu-user, or natively on Arm.

Verified this way: every kernel of the sets "neon" and "i8mm" gives the plain C++ kernels' bytes, and those give the
bytes that they give on this machine. Not verified: speed, and any real Arm processor that this is not run on.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
from machine_code_cases import TOOLS, machine_code, run_check

ON_ARM = platform.machine() in ("aarch64", "arm64")


@machine_code(*(("c++",) if ON_ARM else ("aarch64-linux-gnu-g++", "qemu-aarch64", "c++")))
def test_arm_kernels_equal_plain_ones(tmp_path: Path) -> None:
    check = run_check("arm", tmp_path)
    if not ON_ARM:
        assert check.stdout.startswith("the same results")


@pytest.mark.skipif(shutil.which("c++") is None, reason="not installed: c++")
def test_the_check_is_of_the_kernels_as_they_are() -> None:
    """It is run on request only: here it is compiled against the headers that it checks."""
    words = ["c++", "-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", '-DSETS="scalar"']
    words += [f"-I{TOOLS.parent / 'kernels' / 'cpu'}", str(TOOLS / "kernels_test.cpp")]
    check = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert check.returncode == 0, check.stderr
