"""The knapsack of widths, against all combinations, and what a budget means for a model."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from error_cases import run_command

from kbit.calibration.request import CalibrationRequest
from kbit.checkpoint.resolve import open_model
from kbit.formats.quant_format import QuantFormat
from kbit.formats.trellis import TrellisFormat
from kbit.formats.trellis_code import normal_error
from kbit.host.errors import UsageError
from kbit.quantizers.allocate import Choice, allocate
from kbit.quantizers.mixed import Budget, known_formats, mixed_formats
from kbit.quantizers.plan import make_plan
from kbit.quantizers.trellis import Trellis

FORMATS = [QuantFormat.parse(text) for text in ("lloyd2-b64", "nf3-b64", "nf4-b64", "lloyd5-b64")]


def choices(*costs: tuple[float, ...], nbytes: int = 100) -> dict[str, tuple[Choice, ...]]:
    """Matrices of one size, with these costs at 2, 3, ... bits."""
    return {
        f"m{index}": tuple(
            Choice(format, nbytes * format.bits, cost) for format, cost in zip(FORMATS, own, strict=False)
        )
        for index, own in enumerate(costs)
    }


MODEL = choices((8.0, 2.0, 0.5, 0.12), (1.0, 0.3, 0.07, 0.02), (3.0, 0.9, 0.2, 0.05), (20.0, 6.0, 1.4, 0.4))


@pytest.mark.parametrize("budget", range(800, 2001, 100))
def test_no_combination_within_the_budget_costs_less(budget: int) -> None:
    found = allocate(MODEL, budget)
    assert found.nbytes == sum(choice.nbytes for choice in found.chosen.values()) <= budget
    assert found.cost == pytest.approx(sum(choice.cost for choice in found.chosen.values()))
    best = min(
        sum(choice.cost for choice in combination)
        for combination in product(*MODEL.values())
        if sum(choice.nbytes for choice in combination) <= budget
    )
    assert found.cost == pytest.approx(best)  # equal sizes, convex costs: the greedy choice is the best


def test_a_divergence_is_reached_with_the_fewest_bytes() -> None:
    found = allocate(MODEL, None, 2.0)
    assert found.cost <= 2.0
    fewer = allocate(MODEL, found.nbytes - 100)
    assert fewer.cost > 2.0


def test_choices_off_the_hull_are_never_made() -> None:
    useless = choices((1.0, 0.99, 0.1, 0.05))  # 3 bits buy nothing; 4 do
    assert {allocate(useless, budget).chosen["m0"].format.bits for budget in range(200, 501, 50)} == {2, 4, 5}


def test_impossible_budgets_are_refused() -> None:
    with pytest.raises(UsageError, match="too few: at the narrowest widths"):
        allocate(MODEL, 799)
    with pytest.raises(UsageError, match="out of reach"):
        allocate(MODEL, None, 1e-3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, write_model: object) -> Path:
    folder: Path = write_model(tmp_path_factory.mktemp("mixed") / "model")  # type: ignore[operator]
    return folder


def test_a_model_keeps_to_its_budget(tmp_path: Path, model: Path) -> None:
    common = ["quantize", str(model), "--calibration-tokens", "512", "--block-size", "32"]
    mixed, uniform = tmp_path / "mixed", tmp_path / "uniform"
    assert run_command([*common, "--bits", "3.5", "-o", str(mixed)])[0] == 0
    assert run_command([*common, "--bits", "4", "--uniform", "-o", str(uniform)])[0] == 0
    sizes = {path: sum(file.stat().st_size for file in path.glob("*.safetensors")) for path in (mixed, uniform)}
    assert sizes[mixed] < sizes[uniform]
    with open_model(str(mixed)) as source:
        formats = {info["format"] for info in source.config["quantization_config"]["tensors"].values()}
    assert len(formats) > 1
    code, out, _ = run_command([*common, "--size", "20KB", "-o", str(tmp_path / "sized"), "--json"])
    assert code == 0
    assert 18_000 < json.loads(out)["bytes_after"] <= 20_000
    code, _, error = run_command([*common, "--size", "2KB", "-o", str(tmp_path / "small")])
    assert (code, "too few" in error) == (2, True)


def test_threads_and_reruns_do_not_show(tmp_path: Path, model: Path) -> None:
    found = []
    for threads in ("1", "2"):
        out = tmp_path / threads
        words = ["quantize", str(model), "--bits", "3", "--calibration-tokens", "256", "--threads", threads]
        assert run_command([*words, "-o", str(out)])[0] == 0
        found.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert found[0] == found[1]


def test_all_threads_weigh(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge's pass tells torch to use one thread while it is at work; the weighing beside it has its own."""
    from kbit.quantizers import allocate

    seen = []
    measure = allocate._measure_layer
    monkeypatch.setattr(allocate, "_measure_layer", lambda *given: seen.append(given[-1]) or measure(*given))
    words = ["quantize", str(model), "--calibration-tokens", "512", "--threads", "2", "-o", str(tmp_path / "out")]
    code, _, stderr = run_command(words)
    assert code == 0, stderr
    assert seen
    assert set(seen) == {2}


def test_what_is_weighed_for_fast_is_weighed_for_long_windows(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KBIT_CALIBRATION", str(tmp_path))
    method = Trellis().calibrated_on(CalibrationRequest(tokens=256))
    with open_model(str(model)) as source:
        fast, full = (make_plan(source, TrellisFormat(4, window=window), method=method) for window in (12, 16))
        names = [tensor.source.name for tensor in fast.tensors if tensor.role == "linear"]
        others = [tensor.source.name for tensor in fast.tensors if tensor.role != "linear"]
        assert known_formats(source, full, method, Budget(bits=8), others) is None
        told = mixed_formats(source, fast, method, Budget(bits=4), others).chosen
        known = known_formats(source, full, method, Budget(bits=4), others)
    assert known is not None
    alike = [name for name in names if told[name].format == replace(known.chosen[name].format, window=12)]
    assert alike
    for name in alike:
        share = normal_error(known.chosen[name].format) / normal_error(told[name].format)
        assert share < 1
        assert known.chosen[name].cost == pytest.approx(share * told[name].cost)


def test_overrides_win(tmp_path: Path, model: Path) -> None:
    words = ["quantize", str(model), "--calibration-tokens", "256", "--override", "*.v_proj.weight=int8-b32"]
    assert run_command([*words, "-o", str(tmp_path / "out")])[0] == 0
    with open_model(str(tmp_path / "out")) as source:
        tensors = source.config["quantization_config"]["tensors"]
    assert {row["format"] for name, row in tensors.items() if "v_proj" in name} == {"int8-b32"}
