"""What `kbit scale` prints: its plan, its results and what failed, for people or as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from kbit.cli.options import streaming_output
from kbit.cli.output import print_json, printable

if TYPE_CHECKING:
    from kbit.scaling.sweep.plan import SweepPlan
    from kbit.scaling.sweep.run import SweepResult


def result_dict(result: SweepResult, files: list[Path], conclusion: str | None) -> dict[str, Any]:
    import json

    plan = result.plan
    return {
        "out": str(plan.request.out),
        "table": str(plan.request.out / "points.jsonl"),
        "asked": len(plan.points),
        "measured": result.measured,
        "reused": len(result.points) - result.measured,
        "failed": [{"model": f.model, "format": f.label, "why": f.why} for f in result.failures],
        "left_out": [{"what": item.what, "why": item.why} for item in plan.left_out],
        "seconds": result.seconds,
        "points": [json.loads(point.to_json()) for point in result.points],
        "files": [str(file) for file in files],
        "conclusion": conclusion,
    }


def show_plan(plan: SweepPlan, json: bool) -> None:
    seconds, measured = plan.seconds()
    if json:
        print_json(
            {
                "out": str(plan.request.out),
                "asked": len(plan.points),
                "known": len(plan.points) - len(plan.missing),
                "jobs": plan.jobs.count,
                "seconds": seconds,
                "seconds_from_measurements": measured,
                "context": plan.subjects[0].windows.context,
                "left_out": [{"what": item.what, "why": item.why} for item in plan.left_out],
                "points": [
                    {
                        "key": point.key,
                        "model": point.subject.name,
                        "method": point.cell.method,
                        "format": point.cell.label,
                        "total_bits": point.total_bits,
                        "known": point.known is not None,
                    }
                    for point in plan.points
                ],
                "dry_run": True,
            }
        )
        return
    from rich.console import Console

    from kbit.cli.scale_view import plan_lines, plan_table

    with streaming_output():
        console = Console()
        console.print(plan_table(plan))
        for line in plan_lines(plan):
            console.print(line, highlight=False, markup=False, soft_wrap=True)


def show_result(result: SweepResult, files: list[Path], conclusion: str | None) -> None:
    from rich.console import Console

    from kbit.cli.scale_view import result_lines, result_table

    with streaming_output():
        console = Console()
        if result.points:
            console.print(result_table(result.points))
        for line in [*result_lines(result), *_paragraphs(conclusion)]:
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        page = next((file for file in files if file.suffix == ".html"), None)
        if page is not None:
            console.print(f"report: {printable(page)}", highlight=False, markup=False, soft_wrap=True)


def _paragraphs(text: str | None) -> list[str]:
    return [printable(line) for line in (text or "").splitlines()]


def complain(result: SweepResult) -> None:
    """What could not be measured, on stderr."""
    import os
    import sys

    debug = bool(os.environ.get("KBIT_DEBUG")) or "--debug" in sys.argv
    for failure in result.failures:
        line = f"kbit: error: {failure.model} {failure.label}: {failure.why}"
        if failure.bug is not None:
            line += "; this is a bug: please report it with --debug's output"
        typer.echo(printable(" ".join(line.split())), err=True)
        if debug and failure.bug is not None:
            typer.echo(failure.bug, err=True)
