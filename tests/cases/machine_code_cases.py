"""Checks of the kernels' machine code that tools/ makes with compilers and emulators of its own: how the tests run them."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

Test = TypeVar("Test", bound=Callable[..., object])

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def machine_code(*programs: str) -> Callable[[Test], Test]:
    """Marks a test as one of machine code: minutes of work, on request, on Linux, where these programs are installed."""
    missing = [name for name in programs if shutil.which(name) is None]

    def mark(test: Test) -> Test:
        for condition, reason in (
            (not os.environ.get("KBIT_TEST_MACHINE_CODE"), "takes minutes: set KBIT_TEST_MACHINE_CODE=1"),
            (platform.system() != "Linux", "the tool is for Linux"),
            (bool(missing), f"not installed: {', '.join(missing)}"),
        ):
            test = pytest.mark.skipif(condition, reason=reason)(test)
        return pytest.mark.slow(test)

    return mark


def run_check(tool: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs tools/TOOL/check.sh with its own choice of compilers, and looks at the differences it counted: none."""
    environment = {name: value for name, value in os.environ.items() if name not in ("CXX", "ARM_CXX")}
    command = ["sh", TOOLS / tool / "check.sh", folder, "quick"]
    check = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800, check=False)
    assert check.returncode == 0, check.stdout + check.stderr
    comparisons, differences = re.findall(r"(\d+) comparisons, (\d+) differences", check.stderr)[0]
    assert int(comparisons) > 3000
    assert int(differences) == 0
    return check
