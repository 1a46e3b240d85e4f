"""The steps in their order, and how long each may take."""

from __future__ import annotations

import os

from kbit.gpu_check.place import DRY, FULL
from kbit.gpu_check.runner import Step

MOST_SHARDS = 8
FACTS = Step("facts", "0. The machine", "kbit.gpu_check.facts", 60, essential=True)


def correctness(scale: str) -> list[Step]:
    """The machine, every kernel, whole models."""
    shards = 1 if scale == DRY else max(1, min(MOST_SHARDS, (os.cpu_count() or 1) - 1))
    return [
        FACTS,
        Step("kernels", "1. Kernels against the reference", "kbit.gpu_check.kernels", 150, 60, shards),
        Step("models", "2. Whole models", "kbit.gpu_check.models", 90, 60),
    ]


def performance(scale: str) -> list[Step]:
    """Times, tuning, speed of whole models."""
    found = [Step("times", "3. Times", "kbit.gpu_check.times", 150)]
    if scale in (FULL, DRY):
        found.append(Step("tuned", "5. Tuning the furthest from their floor", "kbit.gpu_check.tuned", 75, 60))
    return [*found, Step("speed", "6. Tokens per second", "kbit.gpu_check.speed", 90, 80)]
