"""Whole-process times of the commands people wait for. Printed, never asserted.

pytest benchmarks/test_startup.py -s
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
from measuring import Contestant, report, take_turns

pytestmark = pytest.mark.full  # not of a plain `pytest benchmarks/`

MODEL = "smollm2-135m-instruct"
COMMANDS = {
    "kbit --help": ["-m", "kbit.cli.main", "--help"],
    "kbit info MODEL": ["-m", "kbit.cli.main", "info", MODEL],
    "kbit run, first token": ["-m", "kbit.cli.main", "run", "--raw", "The capital of France is", "--max-tokens", "1"],
}


def test_commands(benchmark: Any, smollm2: Path, tmp_path: Path) -> None:
    """Seconds; python alone, which does nothing, is the floor."""

    def run(words: list[str]) -> float:
        begin = perf_counter()
        # cwd: a checkout's own kbit/ must not shadow the installed package.
        subprocess.run([sys.executable, *words], check=True, capture_output=True, cwd=tmp_path)
        return perf_counter() - begin

    contestants = [
        Contestant("kbit", name, lambda words=words: run(words), group=name) for name, words in COMMANDS.items()
    ]
    python = Contestant("python", "python -c pass", lambda: run(["-c", "pass"]))
    take_turns(benchmark, [python, *contestants])
    report(
        benchmark, "start of a process", "seconds", contestants, higher_is_better=False, controls=[python], model=MODEL
    )
