"""Sweeps in this process: right figures, nothing measured twice, interruptions continued, failures that say why."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scale_cases import Recorder, figures, request, sweep, write_text

from kbit.backends.select import select_backend
from kbit.calibration.request import CalibrationRequest
from kbit.checkpoint.ladder import Ladder
from kbit.checkpoint.narrowed import narrowed
from kbit.checkpoint.resolve import open_model
from kbit.evaluate.compare import compare
from kbit.formats.nested import NestedFormat
from kbit.formats.quant_format import QuantFormat
from kbit.host.errors import KbitError
from kbit.models.load import load_decoder
from kbit.quantizers.calibrated import TwoSided
from kbit.quantizers.convert import convert
from kbit.quantizers.methods import METHODS
from kbit.quantizers.nested_order import ordered
from kbit.quantizers.plan import make_plan
from kbit.quantizers.settings import Nesting
from kbit.scaling.points import ORIGINAL, read_points
from kbit.scaling.sweep import measure, workers
from kbit.scaling.sweep.plan import plan_sweep
from kbit.scaling.sweep.run import Failure, run_sweep
from kbit.scaling.sweep.subject import content_digest
from kbit.text.datasets import resolve_data
from kbit.text.tokenizer import Tokenizer
from kbit.text.windows import make_windows

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


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KBIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path)


@pytest.fixture
def no_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(workers, "measure", refuse)


class TestFigures:
    def test_real_model_against_a_conversion(self, data_dir: Path, tmp_path: Path) -> None:
        """Every figure of a row, for a folder `kbit quantize` would write, run by the reference backend."""
        model = data_dir / "models" / "novels-0.7m"
        heldout = data_dir / "novels" / "heldout" / "Doyle_Hound_1902.txt"
        out = tmp_path / "out"
        result = sweep(model, out, heldout, bits=(4,), dtypes=("nf",), block_sizes=(64,), context=128, max_tokens=1536)
        original, point = result.points
        exact = select_backend("cpu", backend="reference")
        with open_model(str(model)) as source:
            plan = make_plan(source, QuantFormat.parse("nf4-b64"))
            converted = tmp_path / "converted"
            convert(source, plan, converted)
            windows = make_windows(resolve_data(str(heldout)), Tokenizer.from_source(source), "gptq", 128, 1536)
            with open_model(str(converted)) as quantized:
                found = compare(load_decoder(quantized, exact), load_decoder(source, exact), windows)
                linear = [tensor for tensor in plan.tensors if tensor.role == "linear"]
                weights = [(quantized.read(t.source.name), source.read(t.source.name)) for t in linear]
        # The native backend's fp32 differs from the reference in the order of sums.
        assert point.nll == pytest.approx(found.model.mean_nll, abs=2e-6)
        assert original.nll == pytest.approx(found.reference.mean_nll, abs=2e-6)
        assert point.kl == pytest.approx(found.kl_mean, abs=1e-6)
        assert point.kl > 5e-3
        assert point.top1 == pytest.approx(found.top1_agreement, abs=2 / point.tokens)
        error = sum(float((a - b).square().sum()) for a, b in weights) / sum(
            float(b.square().sum()) for _, b in weights
        )
        assert point.weight_error == pytest.approx(error, rel=1e-4)
        assert point.linear_parameters == sum(b.numel() for _, b in weights) == 655_360
        assert point.linear_bits == 8 * sum(tensor.nbytes for tensor in linear)
        assert point.bits_per_weight == 4.25
        stored = sum(tensor.nbytes for tensor in plan.tensors)
        assert point.total_bits == 8 * stored
        assert original.total_bits == 8 * sum(tensor.source.nbytes for tensor in plan.tensors)
        assert (original.kl, original.top1, original.weight_error, original.bits) == (0.0, 1.0, 0.0, 16)
        assert (original.format, original.dtype, original.method, original.block_size) == (ORIGINAL,) * 3 + (0,)
        assert point.training_tokens == original.training_tokens == 6_324_224
        assert point.tokens == 12 * 127
        tokenizer = Tokenizer.from_source(open_model(str(model)))
        assert point.text_bytes == sum(len(tokenizer.decode(row[1:].tolist()).encode()) for row in windows.ids)
        for values, mean in ((point.cluster_nll, point.nll), (point.cluster_kl, point.kl)):
            assert sum(values) / sum(point.cluster_tokens) == pytest.approx(mean, rel=1e-12)
        assert (point.model, point.data, point.method) == ("novels-0.7m", "Doyle_Hound_1902.txt", "rtn")
        assert "fp32 compute, fp32 KV cache" in point.backend

    def test_embeddings_too(self, tiny_model: Path, tmp_path: Path, text: Path) -> None:
        kept = sweep(tiny_model, tmp_path / "a", text, bits=(4,), dtypes=("nf",)).points
        both = sweep(tiny_model, tmp_path / "b", text, bits=(4,), dtypes=("nf",), embedding_bits=4).points
        assert kept[0].key == both[0].key  # the original is the same point
        assert both[1].total_bits < kept[1].total_bits
        assert both[1].linear_bits == kept[1].linear_bits
        assert both[1].kl > kept[1].kl

    def test_int8_runs_the_original_in_int8_too(self, tiny_model: Path, tmp_path: Path, text: Path) -> None:
        fp32 = sweep(tiny_model, tmp_path / "a", text, bits=(8,), dtypes=("int",)).points
        int8 = sweep(tiny_model, tmp_path / "b", text, bits=(8,), dtypes=("int",), compute="int8").points
        assert not {point.key for point in fp32} & {point.key for point in int8}
        assert all("int8 compute" in point.backend for point in int8)

    def test_every_width_of_one_store(
        self, tiny_model: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Rounded once; a row a width, with what the folder that `kbit quantize` writes has at that width."""
        applied: list[str] = []
        rounding = METHODS["rtn"].apply
        monkeypatch.setattr(type(METHODS["rtn"]), "apply", lambda _, job: applied.append("") or rounding(job))
        result = sweep(tiny_model, tmp_path / "study", text, bits=(2, 3, 5), dtypes=("nested", "trellis-l10"))
        assert not result.failures
        original, *rows = result.points
        ladder = {row.bits: row for row in rows if row.dtype == "nested"}
        assert [row.format for row in ladder.values()] == [f"nested2..5-b32@{width}" for width in (5, 3, 2)]
        assert len(applied) == 1 + len(rows) - len(ladder)
        trellises = {row.bits: row for row in rows if row.dtype == "trellis-l10"}
        assert {bits: row.block_size for bits, row in trellises.items()} == {5: 0, 3: 0, 2: 0}
        assert trellises[2].weight_error < ladder[2].weight_error  # of normal weights
        format = NestedFormat(2, 5, 32)
        with open_model(str(tiny_model)) as source:
            plan = make_plan(source, format)
            convert(source, plan, tmp_path / "out")
            windows = make_windows(resolve_data(str(text)), Tokenizer.from_source(source), "gptq", 32, 320)
            reference = load_decoder(source, select_backend("cpu", backend="reference"))
            linear = [tensor.source.shape for tensor in plan.tensors if tensor.role == "linear"]
            for width, row in ladder.items():
                with narrowed(open_model(str(tmp_path / "out")), width) as narrow:
                    found = compare(load_decoder(narrow, reference.backend), reference, windows)
                assert row.kl == pytest.approx(found.kl_mean, rel=1e-3, abs=1e-6)
                assert row.linear_bits == 8 * sum(format.nbytes(*shape, width) for shape in linear)
                assert original.total_bits - original.linear_bits == row.total_bits - row.linear_bits
        assert ladder[5].kl < ladder[3].kl < ladder[2].kl

    def test_calibrated_widths_of_one_store_are_mixed(
        self, tiny_model: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A row at a number of bits is the rung that the folder of `kbit quantize` has there."""
        monkeypatch.setattr(METHODS["ldlq2"], "request", CalibrationRequest.of([], 256, True))
        monkeypatch.setenv("KBIT_CALIBRATION", str(tmp_path / "calibration"))
        result = sweep(
            tiny_model, tmp_path / "study", text, bits=(2, 3, 4), dtypes=("nested",), methods=("ldlq2",), cache=False
        )
        assert not result.failures
        format = NestedFormat(2, 4, 32)
        method = TwoSided(CalibrationRequest.of([], 256, True)).nested(Nesting.of(2, 4, mixed=True))
        with open_model(str(tiny_model)) as source:
            convert(source, ordered(source, make_plan(source, format, method=method), method), tmp_path / "out")
            windows = make_windows(resolve_data(str(text)), Tokenizer.from_source(source), "gptq", 32, 320)
            reference = load_decoder(source, select_backend("cpu", backend="reference"))
            for row in result.points[1:]:
                with open_model(str(tmp_path / "out")) as made:
                    narrow, widths = narrowed(made, row.bits), Ladder.of(made).at(row.bits)
                    found = compare(load_decoder(narrow, reference.backend), reference, windows)
                    sizes = [format.nbytes(*narrow.tensors[name].shape, width) for name, width in widths.items()]
                assert row.kl == pytest.approx(found.kl_mean, rel=1e-3, abs=1e-6)
                assert row.linear_bits == 8 * sum(sizes)
                assert row.bits != 3 or set(widths.values()) == {2, 3, 4}
        assert read_points(tmp_path / "study" / "points.jsonl") == list(result.points)

    def test_a_method_with_weights_of_its_own(self, data_dir: Path, tmp_path: Path) -> None:
        """Columns kept in 16 bits: floats, not codes; fewer errors, and their bits are counted."""
        heldout = data_dir / "novels" / "heldout" / "Doyle_Hound_1902.txt"
        model = data_dir / "models" / "novels-0.7m"
        options: dict[str, Any] = {"bits": (3,), "dtypes": ("nf",), "block_sizes": (64,), "max_tokens": 512}
        _, plain, kept = sweep(model, tmp_path / "out", heldout, methods=("rtn", "outliers"), **options).points
        assert (plain.method, kept.method, kept.format) == ("rtn", "outliers", "nf3-b64")
        assert kept.weight_error < plain.weight_error
        # 2 % of 128 columns are 3, of 384 columns 8: 13 bits more for each of these weights.
        with open_model(str(model)) as source:
            shapes = [t.source.shape for t in make_plan(source, QuantFormat()).tensors if t.role == "linear"]
        assert kept.linear_bits - plain.linear_bits == sum(
            13 * rows * round(0.02 * columns) for rows, columns in shapes
        )
        assert kept.total_bits - plain.total_bits == kept.linear_bits - plain.linear_bits


class TestNothingTwice:
    def test_the_same_folder(self, tiny_model: Path, tmp_path: Path, text: Path, no_measuring: None) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(workers, "measure", measure.measure)
            first = sweep(tiny_model, tmp_path / "out", text)
        assert first.measured == 5
        table = (tmp_path / "out" / "points.jsonl").read_bytes()
        again = sweep(tiny_model, tmp_path / "out", text)
        assert (again.measured, again.points) == (0, first.points)
        assert (tmp_path / "out" / "points.jsonl").read_bytes() == table

    def test_another_folder(self, tiny_model: Path, tmp_path: Path, text: Path, no_measuring: None) -> None:
        copy = tmp_path / "elsewhere" / "renamed"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(workers, "measure", measure.measure)
            first = sweep(tiny_model, tmp_path / "a", text, cache=True)
        shutil.copytree(tiny_model, copy)
        text.rename(tmp_path / "sea.txt")
        again = sweep(copy, tmp_path / "b", tmp_path / "sea.txt", cache=True)
        assert again.measured == 0
        assert {(point.model, point.data) for point in again.points} == {("renamed", "sea.txt")}
        assert [point.key for point in again.points] == [point.key for point in first.points]
        assert read_points(tmp_path / "b" / "points.jsonl") == list(again.points)

    def test_no_cache(self, tiny_model: Path, tmp_path: Path, text: Path, own_cache: Path) -> None:
        sweep(tiny_model, tmp_path / "a", text, cache=True, bits=(4,))
        stored = sorted((own_cache / "points").rglob("*.json"))
        assert len(stored) == 3
        assert sweep(tiny_model, tmp_path / "b", text, cache=False, bits=(4,)).measured == 3
        assert sorted((own_cache / "points").rglob("*.json")) == stored

    def test_only_what_is_new(
        self, tiny_model: Path, tmp_path: Path, text: Path, write_model: Callable[..., Path]
    ) -> None:
        sweep(tiny_model, tmp_path / "out", text, bits=(4,))
        assert sweep(tiny_model, tmp_path / "out", text, bits=(3, 4)).measured == 2
        other = write_model(tmp_path / "other", seed=1)
        result = sweep((tiny_model, other), tmp_path / "out", text, bits=(3, 4))
        assert result.measured == 5
        assert len(read_points(tmp_path / "out" / "points.jsonl")) == 10

    @pytest.mark.parametrize("change", ["weights", "config", "tokens", "method version"])
    def test_a_change_is_measured(
        self, tiny_model: Path, tmp_path: Path, text: Path, change: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = tmp_path / "model"
        shutil.copytree(tiny_model, model)
        options: dict[str, Any] = {"bits": (4,), "dtypes": ("nf",), "cache": True}
        sweep(model, tmp_path / "a", text, **options)
        if change == "weights":
            data = bytearray((model / "model.safetensors").read_bytes())
            data[-2] ^= 1
            (model / "model.safetensors").write_bytes(data)
        elif change == "config":
            config = json.loads((model / "config.json").read_text())
            (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 2e-5}))
        elif change == "tokens":
            options["max_tokens"] = 288
        else:
            monkeypatch.setattr(type(METHODS["rtn"]), "version", 99)
        assert sweep(model, tmp_path / "b", text, **options).measured == (1 if change == "method version" else 2)

    def test_dates_do_not_matter(self, tiny_model: Path, tmp_path: Path) -> None:
        copy = tmp_path / "copy"
        shutil.copytree(tiny_model, copy, copy_function=shutil.copyfile)
        (copy / "training.json").write_text('{"training_tokens": 5}')
        with open_model(str(tiny_model)) as a, open_model(str(copy)) as b:
            assert a.fingerprint() != b.fingerprint()
            assert content_digest(a) == content_digest(b) == content_digest(b, remember=False)


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
