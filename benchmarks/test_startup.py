"""Whole-process times of the commands people wait for. Printed, never asserted.

pytest benchmarks/test_startup.py
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

COMMANDS = {
    "python": ["-c", "pass"],
    "help": ["-m", "kbit.cli.main", "--help"],
    "info": ["-m", "kbit.cli.main", "info", "smollm2-135m-instruct"],
    "first-token": ["-m", "kbit.cli.main", "run", "The capital of France is", "--max-tokens", "1"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_command(benchmark: Any, smollm2: Path, command: str, tmp_path: Path) -> None:
    """`python` is the floor: the interpreter alone."""

    def run() -> None:
        # cwd: a checkout's own kbit/ must not shadow the installed package.
        subprocess.run([sys.executable, *COMMANDS[command]], check=True, capture_output=True, cwd=tmp_path)

    benchmark.pedantic(run, rounds=3 if command == "first-token" else 10, warmup_rounds=1)
