"""Sweeps that are stopped or fail: interruptions are continued, failures say why."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scale_cases import Recorder, figures, request, sweep

from kbit.host.errors import KbitError
from kbit.quantizers.methods import METHODS
from kbit.scaling.points import ORIGINAL, read_points
from kbit.scaling.sweep import measure, workers
from kbit.scaling.sweep.plan import plan_sweep
from kbit.scaling.sweep.run import Failure, run_sweep

pytestmark = pytest.mark.usefixtures("one_thread", "own_cache")

# `kbit scale` of ten windows a row that ends as if killed, in the middle of its fourth row.
KILLED_IN_ITS_35TH_WINDOW = """
import os, signal, typer
from kbit.cli.scale import scale
from kbit.evaluate.logits import ModelLogits

compute, begun = ModelLogits.window, []

def window(*arguments):
    begun.append(arguments)
    if len(begun) == 35:
        os.kill(os.getpid(), signal.SIGKILL)
    return compute(*arguments)

ModelLogits.window = window
typer.run(scale)
"""


class TestInterruptions:
    def test_a_stop_at_every_point(self, tiny_model: Path, tmp_path: Path, text: Path) -> None:
        """Ctrl-C after each point in turn: each run measures just one more."""
        whole = sweep(tiny_model, tmp_path / "whole", text)
        for count in range(1, 6):

            def stop(_status: object, news: object) -> None:
                if news is not None:
                    raise KeyboardInterrupt

            with pytest.raises(KeyboardInterrupt):
                run_sweep(plan_sweep(request(tiny_model, tmp_path / "out", text)), stop)
            assert len(read_points(tmp_path / "out" / "points.jsonl")) == count
        last = sweep(tiny_model, tmp_path / "out", text)
        assert last.measured == 0
        assert figures(last.points) == figures(whole.points)
        assert not list((tmp_path / "out").glob("reference-*"))

    @pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
    def test_kill_9(self, tiny_model: Path, tmp_path: Path, text: Path) -> None:
        """A process killed while it measures its fourth row. What it had measured stays as it is, byte for byte."""
        out = tmp_path / "out"
        same = f"--data {text} --context 32 --max-tokens 320 --block-sizes 32 --jobs 1 --no-cache --no-report"
        command = [sys.executable, "-c", KILLED_IN_ITS_35TH_WINDOW, str(tiny_model), "-o", str(out), *same.split()]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr
        table = out / "points.jsonl"
        rows = table.read_text()
        assert rows.count("\n") == 3
        assert rows.endswith("\n")
        recorder = Recorder()
        options: dict[str, Any] = {"bits": tuple(range(2, 9)), "dtypes": ("nf", "int", "float")}
        result = run_sweep(plan_sweep(request(tiny_model, out, text, **options)), recorder)
        assert result.measured == len(recorder.news) == 22 - 3
        assert table.read_text().startswith(rows)
        assert table.read_text().count("\n") == 22
        assert not list(out.glob("reference-*"))

    def test_a_reference_left_by_a_kill_is_taken_up(
        self, tiny_model: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out, windows = tmp_path / "out", []
        plan = plan_sweep(request(tiny_model, out, text, bits=(4,)))

        def stop(status: Any, _news: object) -> None:
            if status.running and status.running[0].fraction >= 0.5:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run_sweep(plan, stop)
        (left,) = out.glob("reference-*.done")
        assert left.read_text().count("\n") == 5
        (out / "reference-of-another-time.logits").write_bytes(b"stale")
        from kbit.evaluate.logits import ModelLogits

        compute = ModelLogits.window
        monkeypatch.setattr(ModelLogits, "window", lambda s, w, i: (windows.append(i), compute(s, w, i))[1])
        assert run_sweep(plan).measured == 3
        assert windows[:5] == [5, 6, 7, 8, 9]
        assert len(windows) == 5 + 2 * 10
        assert not list(out.glob("reference-*"))

    def test_a_row_cut_short(self, tiny_model: Path, tmp_path: Path, text: Path) -> None:
        whole = sweep(tiny_model, tmp_path / "out", text)
        table = tmp_path / "out" / "points.jsonl"
        table.write_bytes(table.read_bytes()[:-20])
        again = sweep(tiny_model, tmp_path / "out", text)
        assert again.measured == 1
        assert figures(read_points(table)) == figures(whole.points)


class TestFailures:
    def test_one_point_fails_and_the_others_do_not(
        self, tiny_model: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rtn = METHODS["rtn"]

        class Broken(type(rtn)):  # type: ignore[misc]
            def apply(self, job: Any) -> Any:
                if job.plan.default_format.bits == 3:
                    raise KbitError("a scale of 1e30 does not fit fp16")
                return rtn.apply(job)

        monkeypatch.setitem(METHODS, "rtn", Broken())
        recorder = Recorder()
        result = run_sweep(plan_sweep(request(tiny_model, tmp_path / "out", text)), recorder)
        assert [point.format for point in result.points] == [ORIGINAL, "nf4-b32", "int4-b32"]
        assert [(f.model, f.label, f.why, f.bug) for f in result.failures] == [
            ("model", f"{name}3-b32", "a scale of 1e30 does not fit fp16", None) for name in ("nf", "int")
        ]
        assert sum(isinstance(item, Failure) for item in recorder.news) == 2
        assert recorder.statuses[-1].failed == 2

    def test_a_mistake_of_ours_has_its_traceback(
        self, tiny_model: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(measure, "dtype_label", lambda _: 1 / 0)
        result = sweep(tiny_model, tmp_path / "out", text, bits=(4,), dtypes=("nf",))
        (failure,) = result.failures
        assert failure.why == "ZeroDivisionError: division by zero"
        assert "Traceback" in (failure.bug or "")

    @pytest.mark.parametrize(
        "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: not enough memory: you tried")]
    )
    def test_out_of_memory(
        self, tiny_model: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
    ) -> None:
        def fail(*_: object) -> None:
            raise error

        monkeypatch.setattr(workers, "measure", fail)
        result = sweep(tiny_model, tmp_path / "out", text, bits=(4,), dtypes=("nf",))
        assert not result.points
        first, second = (failure.why for failure in result.failures)
        assert first == "out of memory: use fewer --jobs"
        assert second == f"the original could not be measured: {first}"

    def test_nan_in_the_model(self, tmp_path: Path, text: Path, write_model: Callable[..., Path]) -> None:
        import torch
        from safetensors.torch import load_file, save_file

        model = write_model(tmp_path / "model")
        tensors = load_file(model / "model.safetensors")
        tensors["model.layers.0.mlp.up_proj.weight"][3, 3] = torch.nan
        save_file(tensors, model / "model.safetensors")
        result = sweep(model, tmp_path / "out", text)
        assert not result.points
        assert "NaN" in result.failures[0].why

    def test_a_model_that_changes_meanwhile(self, tiny_model: Path, tmp_path: Path, text: Path) -> None:
        model = tmp_path / "model"
        shutil.copytree(tiny_model, model)
        plan = plan_sweep(request(model, tmp_path / "out", text, bits=(4,)))
        data = bytearray((model / "model.safetensors").read_bytes())
        data[-2] ^= 1
        (model / "model.safetensors").write_bytes(data)
        assert "changed" in run_sweep(plan).failures[0].why
