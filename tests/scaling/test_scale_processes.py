"""Sweeps by several processes: the same rows as one, a process that dies, a Ray cluster of two workers."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from scale_cases import Recorder, request, sweep

from kbit.host.errors import KbitError, UnsupportedError
from kbit.scaling.points import Point
from kbit.scaling.sweep.plan import plan_sweep
from kbit.scaling.sweep.run import Failure, run_sweep
from kbit.scaling.sweep.workers import ProcessPool

pytestmark = pytest.mark.usefixtures("one_thread")

FIGURES = ("key", "format", "nll", "kl", "top1", "weight_error", "total_bits", "cluster_nll", "cluster_kl")


def figures(points: Any) -> list[list[object]]:
    return sorted([getattr(point, name) for name in FIGURES] for point in points)


def test_two_processes_measure_what_one_does(tiny_model: Path, tmp_path: Path, text: Path, write_model: Any) -> None:
    models = (tiny_model, write_model(tmp_path / "other", seed=1))
    alone = sweep(models, tmp_path / "alone", text)
    recorder = Recorder()
    together = run_sweep(plan_sweep(request(models, tmp_path / "together", text, jobs=2)), recorder)
    assert figures(together.points) == figures(alone.points)
    assert together.measured == 10
    assert max(len(status.running) for status in recorder.statuses) == 2
    assert sorted(path.name for path in (tmp_path / "together").iterdir()) == [".lock", "points.jsonl", "sweep.json"]


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_process_that_dies_costs_its_point_only(
    tiny_model: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the system runs out of memory. Another process takes its place, and the next run measures the point."""
    pools: list[ProcessPool] = []
    make = ProcessPool.__init__

    def remember(pool: ProcessPool, jobs: int) -> None:
        make(pool, jobs)
        pools.append(pool)

    monkeypatch.setattr(ProcessPool, "__init__", remember)
    killed: list[int] = []

    def kill_once(status: Any, news: Point | Failure | None) -> None:
        busy = [worker for worker in pools[0]._workers if worker.task is not None] if pools else []
        if isinstance(news, Point) and not killed and busy:
            assert busy[0].process.pid is not None
            killed.append(busy[0].process.pid)
            os.kill(busy[0].process.pid, signal.SIGKILL)

    plan = plan_sweep(request(tiny_model, tmp_path / "out", text, bits=tuple(range(2, 9)), jobs=2))
    result = run_sweep(plan, kill_once)
    assert killed
    # The process may have finished its point in the moment before.
    assert [f.why for f in result.failures] in (
        [],
        ["its process ended unexpectedly (signal 9): perhaps memory ran out; use fewer --jobs"],
        ["its process ended unexpectedly: run the sweep again"],
    )
    assert result.measured + len(result.failures) == 15
    again = sweep(tiny_model, tmp_path / "out", text, bits=tuple(range(2, 9)))
    assert again.measured == len(result.failures)
    assert len(again.points) == 15


class TestRay:
    @pytest.mark.slow
    @pytest.mark.skipif(sys.platform == "win32", reason="Ray's Windows version is a beta")
    def test_two_workers(self, tiny_model: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        ray = pytest.importorskip("ray")
        alone = sweep(tiny_model, tmp_path / "alone", text)
        plan = plan_sweep(request(tiny_model, tmp_path / "out", text, cluster="local", jobs=2))
        try:
            result = run_sweep(plan)
        except Exception as error:
            if "timed out" not in str(error):
                raise
            pytest.skip(f"Ray did not start within the 30 seconds it gives itself: {error}")
        assert not result.failures
        assert figures(result.points) == figures(alone.points)
        assert not ray.is_initialized()

    def test_without_ray(self, tiny_model: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "ray", None)
        plan = plan_sweep(request(tiny_model, tmp_path / "out", text, cluster="local"))
        with pytest.raises(UnsupportedError, match=r"kbit\[cluster\]"):
            run_sweep(plan)

    def test_no_cluster_there(self, tiny_model: Path, tmp_path: Path, text: Path) -> None:
        pytest.importorskip("ray")
        plan = plan_sweep(request(tiny_model, tmp_path / "out", text, cluster="nonsense"))
        with pytest.raises(KbitError, match="--cluster nonsense"):
            run_sweep(plan)
