"""`kbit scale` as a person and as a program meet it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from rich.console import Console
from scale_cases import Recorder, request
from typer.testing import CliRunner

from kbit.cli.scale import scale
from kbit.cli.scale_view import duration, live_view, plan_table, result_table
from kbit.host.errors import UsageError
from kbit.scaling.points import ORIGINAL, read_points
from kbit.scaling.sweep.plan import plan_sweep
from kbit.scaling.sweep.run import run_sweep

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def run(tmp_path: Path, text: Path) -> Any:
    app = typer.Typer()
    app.command()(scale)
    same = ["-o", str(tmp_path / "out"), "--data", str(text), "--context", "32", "--max-tokens", "320", "--jobs", "1"]

    def invoke(*arguments: object) -> Any:
        return CliRunner().invoke(app, [*(str(argument) for argument in arguments), *same])

    return invoke


def shown(view: Any, width: int = 100) -> str:
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(view)
    return console.export_text()


def test_json(run: Any, tiny_model: Path, tmp_path: Path) -> None:
    result = run(
        tiny_model, "--bits", "3..4", "--dtypes", "nf,float-e3", "--block-sizes", "row", "--json", "--no-report"
    )
    assert result.exit_code == 0, result.exception
    assert result.stdout.count("\n") == 1
    report = json.loads(result.stdout, parse_constant=pytest.fail)
    assert (report["asked"], report["measured"], report["reused"], report["failed"]) == (4, 4, 0, [])
    assert [row["format"] for row in report["points"]] == [ORIGINAL, "nf4-row", "float4e3m0-row", "nf3-row"]
    assert report["left_out"] == [
        {
            "what": "rtn, float-e3, 3 bits, one scale per row",
            "why": "3 exponent bits do not fit a 3-bit float (one bit is the sign)",
        }
    ]
    assert report["table"] == str(tmp_path / "out" / "points.jsonl")
    rows = [json.loads(line) for line in Path(report["table"]).read_text().splitlines()]
    assert rows == report["points"]
    again = json.loads(
        run(tiny_model, "--bits", 4, "--dtypes", "nf", "--block-sizes", "row", "--json", "--no-report").stdout
    )
    assert (again["measured"], again["reused"]) == (0, 2)


def test_everything_a_sweep_writes(run: Any, data_dir: Path, tmp_path: Path) -> None:
    """Two real models, with laws, pictures and the page."""
    models = [data_dir / "models" / name for name in ("novels-0.7m", "novels-2m")]
    result = run(*models, "--bits", "3,4,5", "--dtypes", "nf,int")
    assert result.exit_code == 0, result.exception
    for word in ("novels-0.7m", "novels-2m", "nf4-b64", "14 points measured", "report: "):
        assert word in result.stdout
    out = tmp_path / "out"
    assert {"points.jsonl", "sweep.json", "laws.json", "report.html", "conclusion.txt"} <= {
        p.name for p in out.iterdir()
    }
    assert (out / "conclusion.txt").read_text().splitlines()[0] in result.stdout
    json.loads((out / "laws.json").read_text(), parse_constant=pytest.fail)
    page = (out / "report.html").read_text()
    assert "novels-2m" in page
    assert "<svg" in page
    losses = {(point.model, point.format): point for point in read_points(out / "points.jsonl")}
    for model in ("novels-0.7m", "novels-2m"):
        kl = [losses[model, f"nf{bits}-b64"].kl for bits in (3, 4, 5)]
        assert kl[0] > 3 * kl[1] > 9 * kl[2] > 0


def test_dry_run(run: Any, tiny_model: Path, tmp_path: Path) -> None:
    result = run(tiny_model, "--dry-run", "--bits", "4", "--block-sizes", "64,128")
    assert result.exit_code == 0, result.exception
    for word in ("7 points", "nf4-b128", "known: 0, to measure: 7", "a guess", "10 windows of 32 tokens"):
        assert word in result.stdout
    assert not (tmp_path / "out").exists()
    plan = json.loads(run(tiny_model, "--dry-run", "--bits", "4", "--json").stdout)
    assert plan["dry_run"]
    assert (plan["asked"], plan["known"], plan["context"], plan["jobs"]) == (4, 0, 32, 1)
    assert [point["known"] for point in plan["points"]] == [False] * 4
    run(tiny_model, "--bits", "4", "--dtypes", "nf", "--no-report")
    known = json.loads(run(tiny_model, "--dry-run", "--bits", "4", "--json").stdout)
    assert known["known"] == 2
    assert known["seconds_from_measurements"]
    point = next(point for point in known["points"] if point["format"] == "nf4-b64")
    (row,) = (row for row in read_points(tmp_path / "out" / "points.jsonl") if row.format == "nf4-b64")
    assert point["total_bits"] == row.total_bits


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bits", "9"], "--bits 9"),
        (["--dtypes", "nf,"], "--dtypes"),
        (["--block-sizes", "65"], "--block-sizes 65"),
        (["--methods", "nearest"], "nearest"),
        (["--compute", "fp16"], "--compute fp16"),
        (["--convention", "mine"], "--convention mine"),
    ],
)
def test_wrong_values(run: Any, tiny_model: Path, arguments: list[str], message: str) -> None:
    result = run(tiny_model, *arguments)
    assert isinstance(result.exception, UsageError)
    assert message in str(result.exception)
    assert result.stdout == ""


def test_failures_end_with_exit_code_1(run: Any, tiny_model: Path, tmp_path: Path, write_model: Any) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    model = write_model(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 3] = torch.inf
    save_file(tensors, model / "model.safetensors")
    result = run(model, "--bits", "4", "--dtypes", "nf", "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert [failure["format"] for failure in report["failed"]] == [ORIGINAL, "nf4-b64"]
    assert result.stderr.count("kbit: error: ") == 2
    assert "infinite" in result.stderr


def test_progress_lines_where_there_is_no_terminal(run: Any, tiny_model: Path) -> None:
    result = run(tiny_model, "--bits", "4", "--dtypes", "nf,int", "--no-report")
    lines = result.stderr.splitlines()
    assert [line.split("]")[0] for line in lines] == ["[1/3", "[2/3", "[3/3"]
    assert "nf4-b64: perplexity" in lines[1]
    assert lines[2].endswith("; 0 s left")


# `kbit` whose every process measures two rows and never gets any further: there is always something to interrupt. The
# processes that measure run this as well.
NEVER_DONE = """
import time
from kbit.cli.main import main
from kbit.scaling.sweep import workers

run_task, begun = workers.run_task, []

def run_two_tasks(*arguments):
    begun.append(arguments)
    if len(begun) > 2:
        time.sleep(600)
    return run_task(*arguments)

workers.run_task = run_two_tasks
if __name__ == "__main__":
    main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to send")
def test_ctrl_c(tiny_model: Path, tmp_path: Path, text: Path) -> None:
    """With two processes under way: one line, exit code 130, no process left, and what was measured is kept."""
    words = f"-o out --data {text} --context 32 --max-tokens 320 --block-sizes 16,32,64 --jobs 2 --no-report"
    program = tmp_path / "program.py"
    program.write_text(NEVER_DONE)
    command = [sys.executable, str(program), "scale", str(tiny_model), *words.split()]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True)
    table, deadline = tmp_path / "out" / "points.jsonl", time.monotonic() + 300
    while not (table.is_file() and table.read_text().count("\n") >= 2) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal sends, to all of them
    _, error = process.communicate(timeout=300)
    assert process.returncode == 130
    assert [line for line in error.splitlines() if line and not line.startswith("[")] == [
        "kbit: interrupted; what is measured is in out/points.jsonl, and the same command continues"
    ]
    assert 2 <= len(read_points(table)) <= 4
    while _is_there(process.pid):  # multiprocessing's own helper takes a moment
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _is_there(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


class TestViews:
    def test_live_table(self, tiny_model: Path, tmp_path: Path, text: Path) -> None:
        recorder = Recorder()
        run_sweep(plan_sweep(request(tiny_model, tmp_path / "out", text)), recorder)
        middle = next(s for s in recorder.statuses if s.measured == 2 and s.running)
        view = shown(live_view(middle))
        for word in ("model", "2/5", "2 of 5 points", "left", "nf4-b32", f"{recorder.news[1].kl:.5f}"):  # type: ignore[union-attr]
            assert word in view
        assert "time left unknown yet" in shown(live_view(recorder.statuses[0]))

    def test_names_from_files_cannot_disturb_a_terminal(self, tiny_model: Path, tmp_path: Path, text: Path) -> None:
        plan = plan_sweep(request(tiny_model, tmp_path / "out", text))
        recorder = Recorder()
        result = run_sweep(plan, recorder)
        from dataclasses import replace

        hostile = "\x1b]0;owned\x07[red]x"
        points = [replace(point, model=hostile) for point in result.points]
        status = replace(recorder.statuses[-1], by_model=((hostile, 5, 5),), last=tuple(points))
        subjects = tuple(SimpleNamespace(name=hostile) for _ in plan.subjects)
        strange: Any = SimpleNamespace(points=plan.points, subjects=subjects)
        for view in (live_view(status), result_table(points), plan_table(strange)):
            text_shown = shown(view, width=150)
            assert "\x1b" not in text_shown
            assert "?]0;owned?[red]x" in text_shown

    def test_durations(self) -> None:
        assert [duration(value) for value in (0.4, 59.4, 59.6, 3599, 3661, 90000)] == [
            "0 s",
            "59 s",
            "1 min 0 s",
            "59 min 59 s",
            "1 h 1 min",
            "25 h 0 min",
        ]
