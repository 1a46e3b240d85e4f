"""What gradients say of the weights: against the traces of kbit.evaluate.sensitivity, and against real divergences."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scale_cases import sweep

from kbit.backends.reference.backend import ReferenceBackend
from kbit.checkpoint.resolve import open_model
from kbit.evaluate.compare import compare
from kbit.evaluate.fisher import Diagonal, measure_diagonal, read_diagonal, write_diagonal
from kbit.evaluate.sensitivity import measure_sensitivity
from kbit.formats.quant_format import QuantFormat
from kbit.models.load import load_decoder
from kbit.quantizers.plan import make_plan
from kbit.quantizers.rtn import QuantizedView
from kbit.scaling.points import read_points
from kbit.text.datasets import resolve_data
from kbit.text.tokenizer import Tokenizer
from kbit.text.windows import Windows, make_windows


@pytest.fixture(scope="module")
def model(data_dir: Path) -> Path:
    return data_dir / "models" / "novels-0.7m"


@pytest.fixture(scope="module")
def windows(model: Path, data_dir: Path) -> Windows:
    text = resolve_data(str(data_dir / "novels" / "heldout" / "Doyle_Hound_1902.txt"))
    with open_model(str(model)) as source:
        return make_windows(text, Tokenizer.from_source(source), "gptq", 128, 4 * 128)


@pytest.fixture(scope="module")
def diagonal(model: Path, windows: Windows) -> dict[str, Diagonal]:
    with open_model(str(model)) as source:
        return measure_diagonal(source, windows, probes=4)


def test_rows_add_up_to_the_trace(model: Path, windows: Windows, diagonal: dict[str, Diagonal]) -> None:
    with open_model(str(model)) as source:
        traces = {entry.name: entry for entry in measure_sensitivity(source, windows, probes=4)}
        assert traces.keys() == diagonal.keys()
        for name, own in diagonal.items():
            weight = source.read(name)
            assert own.rows.shape == (weight.shape[0],)
            assert own.columns.shape == (weight.shape[1],)
            assert (own.rows >= 0).all()
            assert float(own.columns.sum()) == pytest.approx(1, abs=1e-5)
            # a_l = |W|^2 / n tr(F) / 2, of other random signs: both lie within a tenth or so of the truth.
            trace = traces[name].kl_per_error * 2 * weight.numel() / float(weight.square().sum())
            assert float(own.rows.sum()) == pytest.approx(trace, rel=0.5)
        total = [sum(traces[name].kl_per_error for name in diagonal)]
        flat = [
            0.5 * float(own.rows.sum()) * float(source.read(name).square().mean()) for name, own in diagonal.items()
        ]
        assert sum(flat) == pytest.approx(total[0], rel=0.2)


@pytest.mark.parametrize("format", ["int4-b64", "nf6-b32"])
def test_expected_is_the_divergence(model: Path, windows: Windows, diagonal: dict[str, Diagonal], format: str) -> None:
    backend = ReferenceBackend()
    with open_model(str(model)) as source:
        plan = make_plan(source, QuantFormat.parse(format))
        view = QuantizedView(source, plan)
        found = compare(load_decoder(view, backend), load_decoder(source, backend), windows).kl_mean
        expected = sum(own.expected_kl(view.read(name) - source.read(name)) for name, own in diagonal.items())
    assert expected == pytest.approx(found, rel=0.2)


def test_an_error_counts_where_the_gradients_are() -> None:
    own = Diagonal(np.array([1.0, 3.0], dtype=np.float32), np.array([0.5, 0.25, 0.25], dtype=np.float32))
    error = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 4.0]])
    assert own.expected_kl(error) == pytest.approx(0.5 * (1 * 0.5 * 4 + 3 * 0.25 * 16))


def test_written_and_read(tmp_path: Path, diagonal: dict[str, Diagonal]) -> None:
    path = tmp_path / "d.npz"
    write_diagonal(path, diagonal)
    back = read_diagonal(path)
    assert back.keys() == diagonal.keys()
    for name, own in diagonal.items():
        assert np.array_equal(back[name].rows, own.rows)
        assert np.array_equal(back[name].columns, own.columns)


@pytest.mark.usefixtures("one_thread")
def test_a_sweep_says_what_errors_are_expected_to_cost(
    model: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KBIT_CACHE", str(tmp_path / "cache"))
    text = data_dir / "novels" / "heldout" / "Doyle_Hound_1902.txt"
    result = sweep(
        model, tmp_path / "out", text, bits=(4,), dtypes=("nf", "int"), block_sizes=(64,), context=128, max_tokens=768,
        methods=("rtn", "outliers"),
    )  # fmt: skip
    original, *points = result.points
    assert (original.expected_kl, original.weight_gain) == (None, None)
    assert len(points) == 4
    for point in points:
        assert point.expected_kl == pytest.approx(point.kl, rel=0.25)
        assert point.weight_gain == pytest.approx(1, abs=0.01)
    by = {(point.method, point.format): point.expected_kl or 0.0 for point in points}
    assert by["outliers", "int4-b64"] < by["rtn", "int4-b64"]
    assert by["rtn", "nf4-b64"] < by["rtn", "int4-b64"]
    assert not list((tmp_path / "out").glob("reference-*"))
    assert read_points(tmp_path / "out" / "points.jsonl") == list(result.points)
