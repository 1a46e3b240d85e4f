"""The kernels under ttsem (tools/ttsem_check.py): no race, no access out of bounds, bfloat16 as the compiler means it.

Here a few cases of every test; the tool alone runs them all.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from module_cases import module_of

pytest.importorskip("triton")

REPOSITORY = Path(__file__).resolve().parents[3]
TOOL = REPOSITORY / "tools" / "ttsem_check.py"
SAMPLE = "4"  # at least one of every test function
MISSING = 3


def files() -> list[Path]:
    found: list[Path] = module_of("tools/ttsem_check.py").test_files([])
    return found


def check(*arguments: str) -> str:
    """What the tool prints; a skip where ttsem is not there."""
    command = [sys.executable, str(TOOL), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    if result.returncode == MISSING:
        pytest.skip(result.stderr.strip())
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_planted_faults_are_found() -> None:
    """A store past the end and a race between programs, each at its line: else a pass below would say nothing."""
    assert "both found" in check("--planted", "only")


@pytest.mark.slow
@pytest.mark.parametrize("path", files(), ids=lambda path: path.stem.removeprefix("test_triton_"))
def test_no_race_and_no_access_out_of_bounds(path: Path) -> None:
    assert "passed" in check("--planted", "not", "--sample", SAMPLE, str(path))
