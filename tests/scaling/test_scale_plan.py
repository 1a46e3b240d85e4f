"""What a sweep is to measure: impossible requests, tables that do not compare, what is known, how long it will take."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from scale_cases import Recorder, labels, request, sweep

from kbit.checkpoint.resolve import open_model
from kbit.formats.quant_format import QuantFormat
from kbit.host.errors import CheckpointError, KbitError, UsageError
from kbit.quantizers.convert import convert
from kbit.quantizers.methods import METHODS
from kbit.quantizers.plan import make_plan
from kbit.scaling.points import ORIGINAL, Point
from kbit.scaling.sweep import plan as sweep_plan
from kbit.scaling.sweep.plan import comparable_rows, plan_sweep
from kbit.scaling.sweep.resources import Rates, choose_jobs
from kbit.scaling.sweep.run import run_sweep
from kbit.scaling.sweep.store import PointStore

pytestmark = pytest.mark.usefixtures("one_thread")


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"compute": "fp16"}, "--compute fp16"),
            ({"convention": "mine"}, "--convention mine"),
            ({"max_tokens": 0}, "--max-tokens 0"),
            ({"max_tokens": 20}, "--max-tokens 20"),
            ({"jobs": 0}, "--jobs 0"),
            ({"threads": -1}, "--threads -1"),
            ({"embedding_bits": 9}, "--embedding-bits 9"),
            ({"context": 65}, "--context 65"),
            ({"methods": ("magic",)}, "magic"),
            ({"data": "no-such-text"}, "no-such-text"),
            ({"models": ()}, "no model"),
            ({"models": ("no/such/folder.gguf",)}, "no such"),
        ],
    )
    def test_impossible_requests(
        self, tiny_model: Path, tmp_path: Path, text: Path, changes: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(UsageError, match=message):
            plan_sweep(replace(request(tiny_model, tmp_path / "out", text), **changes))
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"compute": "int8"}, "compute fp32, not int8"),
            ({"max_tokens": 288}, "max tokens 320, not 288"),
            ({"context": 16}, "context 32, not 16"),
            ({"convention": "llamacpp"}, "convention gptq, not llamacpp"),
            ({"embedding_bits": 4}, "embedding bits 16, not 4"),
        ],
    )
    def test_rows_that_do_not_compare(
        self, tiny_model: Path, tmp_path: Path, text: Path, changes: dict[str, Any], message: str
    ) -> None:
        sweep(tiny_model, tmp_path / "out", text, bits=(4,), dtypes=("nf",))
        with pytest.raises(UsageError, match=message):
            plan_sweep(request(tiny_model, tmp_path / "out", text, **changes))
        text.write_text(text.read_text() + "And so on.")
        with pytest.raises(UsageError, match=r"tides.txt.*content changed"):
            plan_sweep(request(tiny_model, tmp_path / "out", text))

    def test_a_table_of_unknown_settings(self, tiny_model: Path, tmp_path: Path, text: Path) -> None:
        out = tmp_path / "out"
        sweep(tiny_model, out, text, bits=(4,), dtypes=("nf",))
        (out / "sweep.json").unlink()
        with pytest.raises(UsageError, match=r"without its sweep\.json"):
            plan_sweep(request(tiny_model, out, text))
        (out / "sweep.json").write_text("[1")
        with pytest.raises(CheckpointError, match=r"sweep\.json"):
            plan_sweep(request(tiny_model, out, text))

    def test_a_damaged_table(self, tiny_model: Path, tmp_path: Path, text: Path) -> None:
        sweep(tiny_model, tmp_path / "out", text, bits=(4,), dtypes=("nf",))
        with open(tmp_path / "out" / "points.jsonl", "a") as file:
            file.write("{}\n")
        with pytest.raises(KbitError, match=r"points\.jsonl, line 3"):
            plan_sweep(request(tiny_model, tmp_path / "out", text))

    def test_models_that_cannot_be_swept(self, tiny_model: Path, tmp_path: Path, text: Path) -> None:
        copy, quantized = tmp_path / "copy", tmp_path / "quantized"
        shutil.copytree(tiny_model, copy)
        with pytest.raises(UsageError, match="the same model"):
            plan_sweep(request((tiny_model, copy), tmp_path / "out", text))
        with open_model(str(tiny_model)) as source:
            convert(source, make_plan(source, QuantFormat()), quantized)
        with pytest.raises(UsageError, match="already quantized by kbit"):
            plan_sweep(request(quantized, tmp_path / "out", text))
        (copy / "training.json").write_text('{"training_tokens": "many"}')
        with pytest.raises(CheckpointError, match="training_tokens is 'many'"):
            plan_sweep(request(copy, tmp_path / "out", text))

    def test_out_is_in_use(self, tiny_model: Path, tmp_path: Path, text: Path) -> None:
        plan = plan_sweep(request(tiny_model, tmp_path / "out", text))
        (tmp_path / "out").mkdir()
        with FileLock(tmp_path / "out" / ".lock"), pytest.raises(UsageError, match="another sweep"):
            run_sweep(plan)
        (tmp_path / "file").write_text("")
        with pytest.raises(UsageError, match="is a file"):
            plan_sweep(request(tiny_model, tmp_path / "file", text))


class TestPlan:
    def test_what_is_known(
        self, tiny_model: Path, tmp_path: Path, text: Path, write_model: Callable[..., Path]
    ) -> None:
        other = write_model(tmp_path / "other", seed=1)
        sweep(tiny_model, tmp_path / "out", text, bits=(4,), dtypes=("nf",))
        plan = plan_sweep(request((tiny_model, other), tmp_path / "out", text, bits=(4,)))
        assert labels(plan) == [
            (name, label) for name in ("model", "other") for label in (ORIGINAL, "nf4-b32", "int4-b32")
        ]
        assert [point.known is not None for point in plan.points] == [True, True, False, False, False, False]
        seconds, measured = plan.seconds()
        assert measured  # by the first model's rate
        assert seconds > 0
        assert not plan_sweep(request(other, tmp_path / "new", text)).seconds()[1]

    def test_names(self, tmp_path: Path, text: Path, write_model: Callable[..., Path]) -> None:
        a, b = (write_model(tmp_path / name / "same", seed=seed) for seed, name in enumerate("ab"))
        plan = plan_sweep(request((a, b), tmp_path / "out", text, bits=(4,)))
        assert [subject.name for subject in plan.subjects] == [str(a), str(b)]

    def test_one_context_for_all(self, tiny_model: Path, tmp_path: Path, text: Path, write_model: Any) -> None:
        long = write_model(tmp_path / "long", seed=1, max_position_embeddings=128)
        plan = plan_sweep(request((long, tiny_model), tmp_path / "out", text, context=None))
        assert {subject.windows.context for subject in plan.subjects} == {64}

    def test_rows_out_of_date(self, tiny_model: Path, tmp_path: Path, text: Path, monkeypatch: Any) -> None:
        options: dict[str, Any] = {"bits": (4,), "dtypes": ("nf",)}
        (_, old) = sweep(tiny_model, tmp_path / "out", text, **options).points
        monkeypatch.setattr(type(METHODS["rtn"]), "version", 99)
        result = sweep(tiny_model, tmp_path / "out", text, **options)
        rows, aside = comparable_rows(result.plan)
        assert aside == [old]
        assert [row.key for row in rows] == [point.key for point in result.points]

    def test_jobs(self, tiny_model: Path, tmp_path: Path, text: Path, monkeypatch: Any) -> None:
        subjects = plan_sweep(request(tiny_model, tmp_path / "out", text)).subjects
        monkeypatch.setattr("kbit.scaling.sweep.resources.default_threads", lambda: 8)

        def jobs(memory: int | None, asked: int | None = None, tasks: int = 100, threads: int = 1) -> tuple[int, bool]:
            monkeypatch.setattr("kbit.scaling.sweep.resources.available_memory", lambda: memory)
            found = choose_jobs([replace_parameters(subjects[0])], tasks, asked, threads)
            return found.count, found.keep_weights

        # 10^9 parameters: 4.45 GB for the prepared model and the process, 8.45 GB with the weights in memory as well.
        assert jobs(10**12) == (8, True)
        assert jobs(10**12, tasks=3) == (3, True)
        assert jobs(10**12, threads=4) == (2, True)
        assert jobs(24 * 10**9) == (4, False)
        assert jobs(10**9) == (1, False)
        assert jobs(10**9, asked=3) == (3, False)
        assert jobs(None, asked=3) == (3, True)

    def test_rates(self, tiny_model: Path, tmp_path: Path, text: Path, write_model: Callable[..., Path]) -> None:
        big = write_model(tmp_path / "big", seed=1, num_hidden_layers=4)
        subjects = plan_sweep(request((tiny_model, big), tmp_path / "out", text)).subjects
        rates = Rates()
        assert rates.of_point(subjects[0], subjects) is None
        for seconds in (1.0, 2.0, 90.0):
            rates.seconds.setdefault(subjects[0].content, []).append(seconds)
        assert rates.of_point(subjects[0], subjects) == 2.0
        assert rates.of_point(subjects[1], subjects) == 2.0 * subjects[1].parameters / subjects[0].parameters

    def test_time_left_falls_to_nothing(self, tiny_model: Path, tmp_path: Path, text: Path) -> None:
        recorder = Recorder()
        run_sweep(plan_sweep(request(tiny_model, tmp_path / "out", text)), recorder)
        assert recorder.statuses[0].left is None
        left = [status.left for status in recorder.statuses if status.left is not None]
        assert left[0] > 0
        assert left[-1] == 0
        last = recorder.statuses[-1]
        assert (last.total, last.measured, last.reused, last.failed) == (5, 5, 0, 0)
        assert last.by_model == (("model", 5, 5),)
        assert [point.format for point in last.last] == [point.format for point in recorder.news]  # type: ignore[union-attr]
        assert any(0 < item.fraction < 1 for status in recorder.statuses for item in status.running)


class TestStore:
    @pytest.fixture
    def point(self, tiny_model: Path, tmp_path: Path, text: Path) -> Point:
        return sweep(tiny_model, tmp_path / "out", text, bits=(4,), dtypes=("nf",)).points[1]

    def test_keeps_points(self, point: Point, tmp_path: Path) -> None:
        store = PointStore(tmp_path / "store")
        assert store.get(point.key) is None
        assert store.all() == []
        store.put(point)
        store.put(point)
        assert store.get(point.key) == point
        other = replace(point, key="0" * 64, created="2020-01-01T00:00:00+00:00")
        store.put(other)
        assert store.all() == [other, point]

    @pytest.mark.parametrize("content", [b"", b"{}\n", b"\xff\n", b'{"schema": 1}\n'])
    def test_what_is_damaged_is_not_there(self, point: Point, tmp_path: Path, content: bytes) -> None:
        store = PointStore(tmp_path / "store")
        store.put(point)
        (path,) = (tmp_path / "store").rglob("*.json")
        path.write_bytes(content)
        assert store.get(point.key) is None
        assert store.all() == []
        store.put(point)
        assert store.get(point.key) == point

    def test_a_file_under_a_wrong_name(self, point: Point, tmp_path: Path) -> None:
        store = PointStore(tmp_path / "store")
        store.put(point)
        (path,) = (tmp_path / "store").rglob("*.json")
        path.rename(path.with_name(path.name[:2] + "0" * 62 + ".json"))
        assert store.all() == []
        with pytest.raises(ValueError, match="key"):
            store.get("../../etc/passwd")

    def test_nowhere_to_write(self, point: Point, tmp_path: Path) -> None:
        (tmp_path / "store").write_text("")
        with pytest.raises(KbitError, match="--no-cache"):
            PointStore(tmp_path / "store").put(point)


def replace_parameters(subject: Any) -> Any:
    return replace(subject, parameters=10**9)


def test_the_sweep_of_a_plan_is_light() -> None:
    """`kbit scale --dry-run` answers without torch."""
    code = "import sys, kbit.scaling.sweep.plan, kbit.cli.scale; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(sys.prefix))
    assert sweep_plan.DEFAULT_MAX_TOKENS == 8192
