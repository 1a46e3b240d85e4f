"""Problems of a GPU that is not there, and an empty cache, for the tests of tuning."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from kbit.kernels.triton import tuned
from kbit.kernels.triton.product.configs import Problem
from kbit.tuning.stored import DecodeProblem, PrefillProblem, Target, choices

ARCH = "sm_90"
TARGET = Target("NVIDIA H100 80GB HBM3", ARCH, "3.7.1", "ab" * 32)
SQUARE = Problem(1, 4096, 4096, 4, 64, format="nf4-b64")
MANY = replace(SQUARE, tokens=64)
DECODE = DecodeProblem(128, 4, 4, 16)
PREFILL = PrefillProblem(128, 4, 4)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, and nothing installed before or after."""
    monkeypatch.setenv("KBIT_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    for arch in (ARCH, "sm_80", "interpreter"):
        tuned.install(arch, {})


def other_than_default(kernel: str, problem: Any, arch: str = ARCH) -> Any:
    return choices(kernel, arch, problem)[-1]
