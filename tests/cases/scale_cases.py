"""What the tests of sweeps share: a text, small sweeps, and what a run says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from kbit.scaling.points import Point
from kbit.scaling.sweep.plan import SweepPlan, SweepRequest, plan_sweep
from kbit.scaling.sweep.run import Failure, Status, SweepResult, run_sweep

# English enough for a byte tokenizer; every sentence another, so that windows differ.
TEXT = "".join(
    f"On day {day} the tide came in at {day * 37 % 24} and left {day * 7 % 11} boats dry. " for day in range(99)
)


def write_text(folder: Path) -> Path:
    path = folder / "tides.txt"
    path.write_text(TEXT)
    return path


def request(models: Any, out: Path, text: Path, **changes: Any) -> SweepRequest:
    """A sweep of four formats over 10 windows of 32 tokens, in this process, that leaves the store aside."""
    values: dict[str, Any] = {
        "bits": (3, 4),
        "dtypes": ("nf", "int"),
        "block_sizes": (32,),
        "data": str(text),
        "context": 32,
        "max_tokens": 320,
        "jobs": 1,
        "cache": False,
    }
    names = (models,) if isinstance(models, (str, Path)) else models
    return SweepRequest(models=tuple(str(name) for name in names), out=out, **{**values, **changes})


def sweep(models: Any, out: Path, text: Path, **changes: Any) -> SweepResult:
    return run_sweep(plan_sweep(request(models, out, text, **changes)))


def figures(points: Any) -> list[tuple[object, ...]]:
    """All of rows but when they were made, how long it took and who computed."""
    varying = {"created": "", "quantize_seconds": 0.0, "evaluate_seconds": 0.0, "backend": ""}
    rows = [replace(point, **varying) for point in points]
    return sorted((row.key, row) for row in rows)


class Recorder:
    """Keeps everything a run says."""

    def __init__(self) -> None:
        self.statuses: list[Status] = []
        self.news: list[Point | Failure] = []

    def __call__(self, status: Status, news: Point | Failure | None) -> None:
        self.statuses.append(status)
        if news is not None:
            self.news.append(news)


def labels(plan: SweepPlan) -> list[tuple[str, str]]:
    return [(point.subject.name, point.cell.label) for point in plan.points]
