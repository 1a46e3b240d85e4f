"""Sweeps in this process: right figures, and nothing measured twice."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scale_cases import sweep

from kbit.backends.select import select_backend
from kbit.calibration.request import CalibrationRequest
from kbit.checkpoint.ladder import Ladder
from kbit.checkpoint.narrowed import narrowed
from kbit.checkpoint.resolve import open_model
from kbit.evaluate.compare import compare
from kbit.formats.nested import NestedFormat
from kbit.formats.quant_format import QuantFormat
from kbit.models.load import load_decoder
from kbit.quantizers.calibrated import TwoSided
from kbit.quantizers.convert import convert
from kbit.quantizers.methods import METHODS
from kbit.quantizers.nested_order import ordered
from kbit.quantizers.plan import make_plan
from kbit.quantizers.settings import Nesting
from kbit.scaling.points import ORIGINAL, read_points
from kbit.scaling.sweep import measure, workers
from kbit.scaling.sweep.subject import content_digest
from kbit.text.datasets import resolve_data
from kbit.text.tokenizer import Tokenizer
from kbit.text.windows import make_windows

pytestmark = pytest.mark.usefixtures("one_thread", "own_cache")


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
