"""Step 5: `kbit tune` on the kernels furthest from their floor, as step 3 measured them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kbit.gpu_check import times
from kbit.gpu_check.place import Place, Row
from kbit.host.errors import one_line

FURTHEST = 3
TRIED_DRY = 2  # configurations, where no time means anything


def items(place: Place) -> Sequence[str]:
    """The cases with the smallest shares of the roofline that tuning knows; without times, the first one."""
    rows = [row for row in place.earlier.get("times", ()) if "error" not in row and _tunable(row["case"])]
    if not place.timed:
        return [row["case"] for row in rows[:1]]
    ranked = sorted((row for row in rows if row.get("share")), key=lambda row: row["share"])
    return [row["case"] for row in ranked[:FURTHEST]]


def run(place: Place, item: str) -> list[Row]:
    """{"case", "default_us", "tuned_us", "speedup", "config", "tried", "failed", "wrong"}."""
    from kbit.tuning.run import tune_jobs
    from kbit.tuning.stored import choices, target_of
    from kbit.tuning.timing import GpuTimer, Outcome

    row: Row = {"case": item}
    try:
        kind, *rest = item.split()
        job: Any = times.product_job(place, *rest) if kind == "product" else None
        job = job or times.attention_job(place, kind, rest[0], int(rest[1]))
        device = torch.device(place.device)
        target = target_of(device)
        if not place.timed:
            configs = choices(job.kernel, target.arch, job.problem)[:TRIED_DRY]
            (trial,) = job.prepare()
            wrong = sum(trial.is_wrong(trial.launch(config)) for config in configs)
            return [row | {"tried": len(configs), "wrong": wrong, "why": times.NO_TIME}]
        result = tune_jobs([job], target, GpuTimer(device), again=True)
        outcome: Outcome = result.outcomes[0]
        row |= {"tried": outcome.tried, "failed": outcome.failed, "wrong": outcome.wrong, "kept_in": str(result.path)}
        if outcome.entry is None:
            return [row | {"error": "no configuration ran and was right"}]
        default = outcome.entry.default_seconds
        row |= {"tuned_us": outcome.entry.seconds * 1e6, "default_us": None if default is None else default * 1e6}
        row |= {"speedup": outcome.speedup, "config": str(outcome.entry.config)}
    except Exception as error:  # of the compiler or the driver, of any kind
        row["error"] = f"{type(error).__name__}: {one_line(error)}"
        place.survive(error)
    return [row]


def _tunable(case: str) -> bool:
    return case.startswith(("product", "decode", "prefill")) and " trellis" not in case
