"""A step that crashes, hangs or loses the GPU is written down, and the rest goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from kbit.gpu_check import report
from kbit.gpu_check.place import DRY, Place
from kbit.gpu_check.runner import CUT, FAILED, NOT_RUN, PASSED, Result, Step, run_steps

STEP = Step("misbehaving", "Misbehaving", "gpu_check_steps", 60, item_seconds=60)


def rows_of(result: Result, key: str) -> list[Any]:
    return [row.get(key) for row in result.rows]


def test_what_breaks_is_written_down_and_the_rest_runs() -> None:
    """One process dies, one loses the GPU, and an item raises: the items around them have their results."""
    place = Place("cpu", DRY, models=("crash", "lose the GPU", "raise"))
    saved: list[list[str]] = []
    steps = [STEP, Step("after", "After", "gpu_check_steps", 60)]
    results = run_steps(
        steps, place, seconds=300, written=lambda results: saved.append([one.outcome for one in results])
    )
    broken = results[0]
    assert rows_of(broken, "case") == ["first", "crash", "lose the GPU", "raise", "last"]
    assert rows_of(broken, "error") == [
        None,
        "its process was ended by signal 9",
        "the GPU's context was lost",
        "RuntimeError: no such kernel",
        None,
    ]
    assert broken.rows[0]["process"] != broken.rows[-1]["process"]
    assert broken.planned == 5
    # The second step has the same items: what it is told of the first is there.
    assert results[1].rows[0]["earlier"] == ["after", "misbehaving"]
    assert [one.outcome for one in results] == [FAILED, FAILED]
    assert saved == [[FAILED, NOT_RUN], [FAILED, FAILED]]


def test_what_hangs_is_ended() -> None:
    """An item, by its own limit; a step, by its own; and what there is no time left for is not begun."""
    place = Place("cpu", DRY, models=("hang",))
    limited = Step("a", "A", "gpu_check_steps", 120, item_seconds=5)
    (result,) = run_steps([limited], place, seconds=120)
    assert rows_of(result, "case") == ["first", "hang", "last"]
    assert "took more than 5 s" in result.rows[1]["error"]
    results = run_steps([Step("b", "B", "gpu_check_steps", 5), STEP], place, seconds=5.5)
    assert [one.outcome for one in results] == [CUT, NOT_RUN]
    assert results[0].rows[-1] == {"case": "hang", "cut": "the step's 5 s were up"}


def test_processes_that_share_a_step() -> None:
    (result,) = run_steps(
        [Step("a", "A", "gpu_check_steps", 60, shards=2)], Place("cpu", DRY, models=("x", "crash")), seconds=60
    )
    assert sorted(rows_of(result, "case")) == ["crash", "first", "last", "x"]
    assert len({row["process"] for row in result.rows if "process" in row}) in (2, 3)


def test_nothing_runs_after_an_essential_step_failed() -> None:
    essential = Step("facts", "The machine", "gpu_check_steps", 60, essential=True)
    said: list[str] = []
    results = run_steps([essential, STEP], Place("cpu", DRY, models=("raise",)), seconds=60, said=said.append)
    assert [one.outcome for one in results] == [FAILED, NOT_RUN]
    assert said[-1] == "Misbehaving: not run, for want of The machine: RuntimeError: no such kernel"


def test_a_step_that_is_not_there() -> None:
    (result,) = run_steps([Step("a", "A", "no_such_module", 60)], Place("cpu", DRY), seconds=60)
    assert result.rows == [{"case": "starting", "error": "ModuleNotFoundError: No module named 'no_such_module'"}]


def result_of(name: str, rows: list[dict[str, Any]], outcome: str = PASSED) -> Result:
    return Result(Step(name, name, "", 1), rows, len(rows), outcome)


def test_report(tmp_path: Path) -> None:
    """Failures, refusals and worst errors are on the page; JSON holds all rows."""
    kernels = [
        {"case": "gemv int4 1", "worst": 0.25},
        {"case": "gemv int8 1", "worst": 0.5},
        {"case": "gemv int2 1", "worst": 7.0, "error": "3 of 9 are too far off"},
        {"case": "gemm_fp8 int2", "worst": None, "refused": "no fp8"},
    ]
    pairs = [{"case": str(us), "estimate_us": us, "us": 2 * us, "factor": 2.0} for us in (1.0, 3.0, 2.0)]
    facts = [{"gpu": "H9000", "torch": "9.0"}]
    results = [result_of("facts", facts), result_of("kernels", kernels, FAILED), result_of("estimates", pairs)]
    found = report.document(results, Place("cuda", "full"), 0.0, 10.0)
    assert not found["passed"]
    report.write(found, tmp_path / "a.json", tmp_path / "a.md")
    assert json.loads((tmp_path / "a.json").read_text())["steps"][1]["rows"] == kernels
    page = (tmp_path / "a.md").read_text()
    assert page.startswith("# H9000\n")
    assert "NOT every check held" in page
    assert "- **failed** gemv int2 1: 3 of 9 are too far off" in page
    assert "| gemv | 2 | 1 | 0 | 0.500 | gemv int8 1 |" in page
    assert "| gemm_fp8 | 0 | 0 | 1 |" in page
    assert "rank correlation 1.000 over 3 launches" in page
    assert "geometric mean 2.00" in page
    assert report.all_right([result_of("kernels", kernels[:2]), result_of("models", [{}])])
    assert not report.all_right([result_of("kernels", kernels[:2], CUT)])


def test_rank_correlation() -> None:
    import numpy as np
    from scipy.stats import spearmanr

    generator = np.random.default_rng(0)
    for _ in range(20):
        a, b = (generator.integers(0, 6, 9).tolist() for _ in range(2))
        assert report.rank_correlation(a, b) == pytest.approx(spearmanr(a, b).statistic)
