"""Mixed widths of nested files: the order by divergence per byte, what widths then count, and a real model's rungs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from conversion_cases import files_of
from error_cases import run_command

import kbit
from kbit.checkpoint.ladder import ORDER, Ladder, Order
from kbit.formats.nested import NestedFormat
from kbit.formats.quant_format import QuantFormat
from kbit.models.opening import open_model
from kbit.quantizers.allocate import Choice, allocate
from kbit.quantizers.calibrated import Gptq, TwoSided
from kbit.quantizers.nested_order import best_order, emphasis_by_matrix, why_uniform
from kbit.quantizers.plan import make_plan
from kbit.quantizers.settings import Nesting

# Of four matrices of one size, divergences at 2 to 5 bits. Of "b" two steps at once save more than the first alone.
COSTS = {
    "a": {2: 8.0, 3: 2.0, 4: 0.5, 5: 0.12},
    "b": {2: 4.0, 3: 3.9, 4: 0.3, 5: 0.1},
    "c": {2: 1.0, 3: 0.3, 4: 0.08, 5: 0.02},
    "d": {2: 0.0, 3: 0.0, 4: 0.0, 5: 0.0},
}
SIZES = dict.fromkeys(COSTS, 4096)


def test_whole_numbers_have_what_the_knapsack_chooses() -> None:
    """Of matrices of one size: at whole numbers of bits as `allocate` does within these bytes."""
    order = best_order(COSTS, SIZES)
    assert Order.from_json(order.to_json(), dict.fromkeys(COSTS, (5, 4, 3, 2))) == order
    ladder = Ladder((5, 4, 3, 2), SIZES, order)
    formats = {width: QuantFormat("lloyd", width, 64) for width in (2, 3, 4, 5)}
    choices = {
        name: [Choice(format, width * 512, costs[width]) for width, format in formats.items()]
        for name, costs in COSTS.items()
    }
    for bits in (2, 3, 4, 5):
        assert ladder.mean(bits) == bits
        chosen = allocate(choices, bits * 4 * 512).chosen
        found = ladder.at(bits)
        cost = sum(COSTS[name][width] for name, width in found.items())
        assert cost == pytest.approx(sum(choice.cost for choice in chosen.values()))
    assert ladder.at(3) == {"a": 4, "b": 4, "c": 2, "d": 2}
    assert [order.matrices[step] for step in order.steps[:4]] == ["a", "b", "b", "a"]


def test_what_does_not_fit_below_a_whole_number_waits() -> None:
    """The step that saves most is too large for what is left below 3 bits: smaller ones fill it up."""
    sizes = {"a": 300, "b": 300, "c": 100}
    costs = {"a": {2: 9.0, 3: 2.0, 4: 0.1}, "b": {2: 2.0, 3: 0.5, 4: 0.2}, "c": {2: 0.2, 3: 0.1, 4: 0.0}}
    order = best_order(costs, sizes)
    ladder = Ladder((4, 3, 2), sizes, order)
    assert ladder.at(3) == {"a": 4, "b": 2, "c": 3}  # 700 bits of planes
    assert ladder.mean(3) == 3
    assert ladder.at(4) == dict.fromkeys(sizes, 4)


def test_widths_count_by_the_rungs_that_read_them() -> None:
    order = best_order(COSTS, SIZES)
    nesting = Nesting(anchor=4, emphasis=8.0, mixed=True, ends=3.0, between=0.0)
    emphasis = emphasis_by_matrix(order, COSTS, SIZES, nesting)
    ladder = Ladder((5, 4, 3, 2), SIZES, order)
    for name, counted in emphasis.items():
        counts = dict.fromkeys((2, 3, 4, 5), 0.0)
        for bits, weight in ((2, 3.0), (3, 1.0), (4, 8.0), (5, 3.0)):
            whole = sum(COSTS[each][width] for each, width in ladder.at(bits).items())
            width = ladder.at(bits)[name]
            counts[width] += weight * COSTS[name][width] / whole
        most = max(counts.values()) or 1.0
        assert counted == pytest.approx([max(count / most, 0.003) for count in counts.values()], rel=1e-3)
    of_a = nesting.of_matrix(emphasis["a"])
    shares = of_a.shares({2: 4.0, 3: 2.0, 4: 1.0, 5: 0.5})
    assert [shares[width] for width in (2, 3, 4, 5)] == pytest.approx(
        [count * 4.0 / cost for count, cost in zip(emphasis["a"], (4.0, 2.0, 1.0, 0.5), strict=True)]
    )


def test_who_mixes(tiny_model: Path) -> None:
    nesting = Nesting.of(2, 4, mixed=True)
    assert TwoSided().nested(nesting).mixes_nested
    assert Gptq().nested(nesting).mixes_nested
    inputs = TwoSided().nested(nesting)
    inputs = inputs.calibrated_on(replace(inputs.request, gradients=False))
    assert not inputs.mixes_nested
    assert not TwoSided().nested(Nesting.of(4, 4, mixed=True)).mixes_nested
    assert "mixed" not in TwoSided().nested(Nesting.of(2, 4)).settings["nesting"]
    assert TwoSided().nested(nesting).settings["nesting"]["mixed"]
    with open_model(str(tiny_model)) as source:
        plan = make_plan(source, NestedFormat(2, 4, 16))
        assert why_uniform(plan, TwoSided().nested(nesting)) is None
        assert "gradients" in (why_uniform(plan, inputs) or "")
        some = make_plan(source, NestedFormat(2, 4, 16), overrides=[("*up_proj*", "nested3..4-b16")])
        assert "drop --override" in (why_uniform(some, TwoSided().nested(nesting)) or "")


def test_a_real_model_is_better_at_every_rung_with_widths_of_its_own(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command, with --uniform and without: on real text, at the same bytes."""
    model, text = data_dir / "models/novels-0.7m", data_dir / "novels/heldout/Doyle_Hound_1902.txt"
    monkeypatch.setenv("KBIT_CALIBRATION", str(tmp_path / "calibration"))
    flags = ["--nested", "2..4", "--calibration-tokens", "1024", "--no-measure", "--embedding-bits", "16"]
    flags += ["--override", "*.layers.[12].*=keep"]  # of what is rounded, less: the test takes half the time
    for name, more in (("uniform", ["--uniform"]), ("mixed", [])):
        code, _, error = run_command(["quantize", str(model), *flags, *more, "-o", str(tmp_path / name)])
        assert code == 0, error
    found: dict[tuple[str, float], float] = {}
    exact = ["--reference-backend", "native-fp32"]
    for name, bits in (("uniform", 3), ("mixed", 3), ("mixed", 3.5)):
        asked = ["eval", str(tmp_path / name), "--reference", str(model), "--bits", str(bits), "--data", str(text)]
        code, out, error = run_command([*asked, "--max-tokens", "1024", "--compute", "fp32", *exact, "--json"])
        assert code == 0, error
        found[name, bits] = json.loads(out)["kl_mean"]
    assert found["mixed", 3] < 0.95 * found["uniform", 3], found
    assert found["mixed", 3.5] < found["mixed", 3]
    with open_model(str(tmp_path / "mixed")) as mixed, open_model(str(tmp_path / "uniform")) as uniform:
        assert ORDER not in uniform.config["quantization_config"]
        assert Ladder.of(mixed).mean(3) == pytest.approx(3, abs=0.02)


def test_from_python_it_is_the_same_file(small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is weighed is kept, and a plan that was saved makes the same bytes, mixed or not, whatever the anchor."""
    monkeypatch.setenv("KBIT_CALIBRATION", str(tmp_path / "calibration"))
    flags = ["--nested", "2..4", "--calibration-tokens", "256", "--no-measure"]
    for name, more in (("mixed", []), ("uniform", ["--uniform"]), ("anchored", ["--uniform", "--anchor", "2"])):
        plan, made = tmp_path / f"{name}.json", ["-o", str(tmp_path / name)]
        for last in (["--save-plan", str(plan)], made):
            code, _, error = run_command(["quantize", str(small_model), *flags, *more, *last])
            assert code == 0, error
        command = ["quantize", str(small_model), "--plan", str(plan), "--no-measure", "-o", str(tmp_path / f"{name}-2")]
        code, _, error = run_command(command)
        assert code == 0, error
        assert files_of(tmp_path / f"{name}-2").keys() == files_of(tmp_path / name).keys()
        for file in ("config.json", "model.safetensors"):
            assert (tmp_path / f"{name}-2" / file).read_bytes() == (tmp_path / name / file).read_bytes()
        assert "predicted_kl" not in json.loads(plan.read_text())  # (at which width?)
    anchored, uniform = (tmp_path / f"{name}/model.safetensors" for name in ("anchored", "uniform"))
    assert anchored.read_bytes() != uniform.read_bytes()
    run = ["run", "Hi", "--raw", "--max-tokens", "2", "--bits", "2.5", "--model"]
    code, _, error = run_command([*run, str(tmp_path / "uniform")])
    assert code == 2
    assert "or make a file that serves all between with kbit quantize --nested 2..4, by a calibrated method" in error
    assert run_command([*run, str(tmp_path / "mixed")])[0] == 0
    again = kbit.quantize(small_model, tmp_path / "again", nested="2..4", calibration_tokens=256, threads=1)
    assert (again.path / "config.json").read_bytes() == (tmp_path / "mixed/config.json").read_bytes()
    assert (again.path / "config.json").read_bytes() != (tmp_path / "uniform/config.json").read_bytes()
    assert list((tmp_path / "calibration").glob("*/costs-*.json"))


def test_without_gradients_it_says_that_widths_are_not_mixed(tiny_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(97 + place * 7 % 25) for place in range(4000)))
    flags = ["--nested", "2..4", "--method", "gptq", "--inputs-only", "--calibration-tokens", "256", "--no-measure"]
    out = tmp_path / "out"
    command = ["quantize", str(tiny_model), *flags, "--calibration", str(text), "--block-size", "16", "-o", str(out)]
    code, _, error = run_command(command)
    assert code == 0, error
    assert "nested widths are not mixed: what errors cost is told by gradients" in error
    with open_model(str(out)) as source:
        assert Ladder.of(source).order is None
