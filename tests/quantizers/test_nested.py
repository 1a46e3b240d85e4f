"""Nested rounding: each step against plain torch, and what it gains on a real model's matrices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from kbit import _native
from kbit.calibration.factors import Factors
from kbit.formats.blockwise import quantize_blockwise
from kbit.formats.nested import NestedFormat
from kbit.formats.nested_codec import codes_at
from kbit.formats.quant_format import QuantFormat
from kbit.host.errors import KbitError, UsageError
from kbit.quantizers.calibrated import ScaleSearch, TwoSided
from kbit.quantizers.ldlq import Feedback
from kbit.quantizers.methods import get_method
from kbit.quantizers.nested import _best_factors, round_nested
from kbit.quantizers.settings import Nesting, Settings

SETS = _native.instruction_sets()


def definite(size: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(size, 2 * size, generator=generator) + 1.5 * torch.randn(1, 2 * size, generator=generator)
    return root @ root.T / (2 * size)


def problem(rows: int, columns: int) -> tuple[torch.Tensor, Factors]:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    return weight, Factors(definite(columns, 2), definite(rows, 3))


def cost(error: torch.Tensor, feedback: Feedback) -> float:
    """tr(H_O E H_I E') in float64."""
    assert feedback.curvature is not None
    outputs = feedback.curvature.outputs
    heard = error.double() @ feedback.curvature.inputs.double()
    return float(((heard if outputs is None else outputs.double() @ heard) * error.double()).sum())


def total(matrix: torch.Tensor, weight: torch.Tensor, feedback: Feedback) -> float:
    return cost(weight - matrix, feedback)


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("widths", [(2, 3, 4, 5, 6, 7, 8), (3, 4), (5,), (2, 5, 8)])
def test_a_code_becomes_the_one_that_costs_least(isa: str, widths: tuple[int, ...]) -> None:
    """One column, so that no other code changes: the best of all codes by trying each, in float64."""
    rows, generator = 16, torch.Generator().manual_seed(len(widths))
    levels = [torch.randn(2**bits, generator=generator) for bits in widths]
    weights = [float(4.0**index) for index in range(len(widths))]
    slopes = torch.randn(len(widths), rows, 1, generator=generator)
    scales = torch.rand(len(widths), rows, 1, generator=generator) + 0.5
    inputs, outputs = torch.tensor([[0.7]]), torch.eye(rows)
    before = torch.randint(0, 2 ** widths[-1], (rows, 1), generator=generator).to(torch.uint8)
    codes, change = before.clone(), torch.empty(len(widths), rows, 1)
    _native.descend_nested_rows(slopes, inputs, outputs, levels, weights, 1, scales, codes, change, isa)
    for row in range(rows):
        costs = []
        for code in range(2 ** widths[-1]):
            terms = []
            for index, bits in enumerate(widths):
                value = levels[index][code % 2**bits] - levels[index][int(before[row]) % 2**bits]
                step = float(value.double() * scales[index, row, 0].double())
                terms.append(weights[index] * (0.7 * step * step - 2 * step * float(slopes[index, row, 0])))
            costs.append(sum(terms))
        chosen = int(codes[row])
        assert costs[chosen] <= min(costs) + 1e-4 * (abs(min(costs)) + 1)
        for index, bits in enumerate(widths):
            moved = (levels[index][chosen % 2**bits] - levels[index][int(before[row]) % 2**bits]) * scales[
                index, row, 0
            ]
            assert float(change[index, row, 0]) == pytest.approx(float(moved), abs=1e-6)
    assert not torch.equal(codes, before)


@pytest.mark.parametrize("rows", [16, 5])
def test_no_sweep_raises_the_sum_and_all_sets_agree(rows: int) -> None:
    columns, widths = 150, (2, 3, 4, 5)
    weight, factors = problem(rows, columns)
    format = NestedFormat(2, 5, 64)
    matrix = format.encode(lambda start, stop: weight[start:stop], (rows, columns))
    feedback = Feedback.of(factors, Settings(sweeps=1), columns)
    assert feedback.curvature is not None
    assert feedback.curvature.outputs is not None
    levels = [matrix.codebook[format.levels_at(width)] for width in widths]
    shares = Nesting().weights(widths)
    scales = torch.stack([matrix.stored["scales"].float() for _ in widths])
    start = codes_at(format, matrix.stored, columns, 5)

    def values(codes: torch.Tensor, index: int) -> torch.Tensor:
        spread = scales[index].repeat_interleave(64, dim=1)[:, :columns]
        return levels[index][(codes % 2 ** widths[index]).long()] * spread

    def objective(codes: torch.Tensor) -> float:
        return sum(s * cost(weight - values(codes, i), feedback) for i, s in enumerate(shares))

    found = {}
    for isa in SETS:
        codes, change = start.clone(), torch.empty(4, rows, columns)
        inputs, outputs = feedback.curvature.inputs, feedback.curvature.outputs
        slopes = torch.stack([outputs @ (weight - values(start, i)) @ inputs for i in range(4)])
        _native.descend_nested_rows(slopes, inputs, outputs, levels, shares, 64, scales, codes, change, isa)
        for index in range(4):  # what it says it changed is what it changed
            torch.testing.assert_close(change[index], values(codes, index) - values(start, index), rtol=0, atol=1e-5)
        found[isa] = (codes, change)
    first = found["scalar"]
    assert objective(first[0]) < 0.9 * objective(start)
    for codes, change in found.values():
        assert torch.equal(codes, first[0])
        assert torch.equal(change, first[1])


@pytest.mark.parametrize("two_sided", [True, False])
def test_factors_are_those_that_cost_least(two_sided: bool) -> None:
    """Any other factor of a row costs more."""
    rows, columns = 12, 40
    weight, factors = problem(rows, columns)
    feedback = Feedback.of(factors, Settings(sweeps=1, two_sided=two_sided), columns)
    assert feedback.curvature is not None
    values = 0.8 * weight + 0.2 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(5))
    best = _best_factors(weight, values, feedback.curvature)
    least = cost(weight - best * values, feedback)
    for row in range(rows):
        for step in (-0.02, 0.02):
            other = best.clone()
            other[row] += step
            assert cost(weight - other * values, feedback) > least


def test_all_widths_are_better_than_rounding_and_the_anchor_most() -> None:
    rows, columns = 64, 192
    weight, factors = problem(rows, columns)
    format = NestedFormat(2, 6, 64)
    feedback = Feedback.of(factors, Settings(sweeps=1), columns)
    plain = format.encode(lambda start, stop: weight[start:stop], (rows, columns))
    ratios = {}
    for anchor in (3, 5):
        matrix = round_nested(weight, format, feedback, Nesting(anchor), name="w")
        assert matrix.format == format
        assert {name: part.shape for name, part in matrix.stored.items()} == {
            name: part.shape for name, part in format.parts(rows, columns).items()
        }
        ratios[anchor] = {
            width: total(matrix.dequantize(width=width), weight, feedback)
            / total(plain.dequantize(width=width), weight, feedback)
            for width in format.widths
        }
        assert max(ratios[anchor].values()) < 0.9, ratios
    assert ratios[3][3] < ratios[5][3]
    assert ratios[5][5] < ratios[3][5]


@pytest.mark.parametrize(("anchor", "emphasis"), [(4, 100.0), (2, 100.0)])
def test_no_width_is_worse_than_rounding(anchor: int, emphasis: float) -> None:
    """Inputs that say much of each other, so that descent moves weights far; without limits the anchor takes all there is."""
    rows, columns = 32, 128
    weight, _ = problem(rows, columns)
    inputs, outputs = (0.7 ** (torch.arange(n) - torch.arange(n)[:, None]).abs().float() for n in (columns, rows))
    factors = Factors(inputs, outputs)
    format = NestedFormat(2, 8, 64)
    feedback = Feedback.of(factors, Settings(sweeps=1), columns)
    nearest = {
        width: total(quantize_blockwise(weight, plain).dequantize(), weight, feedback)
        for width in range(2, 9)
        if isinstance(plain := format.at_width(width), QuantFormat)
    }

    def ratios(nesting: Nesting) -> dict[int, float]:
        matrix = round_nested(weight, format, feedback, nesting, name="w")
        return {width: total(matrix.dequantize(width=width), weight, feedback) / nearest[width] for width in nearest}

    held = ratios(Nesting(anchor, emphasis))
    assert max(held.values()) <= 1.0, held
    assert held[anchor] < 0.9
    free = ratios(Nesting(anchor, emphasis, margin=100.0, tries=1))
    assert max(free.values()) > 1.0


def test_widths_weigh_in_shares_of_what_rounding_costs() -> None:
    """The sum to be made small is that of costs over those of rounding, the anchor's counted more often, times a constant."""
    costs = {2: 10.0, 4: 0.5, 8: 0.002}
    shares = Nesting(4, emphasis=8.0).shares(costs)
    assert {width: shares[width] * costs[width] for width in costs} == pytest.approx({2: 10.0, 4: 80.0, 8: 10.0})
    assert Nesting(2, emphasis=8.0).shares(costs)[2] == 8.0


def test_without_a_calibration_it_is_scales_and_cells(tmp_path: Path) -> None:
    """No factors: errors are not passed on, and every width is about as good as rounding to nearest."""
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(7))
    format, feedback = NestedFormat(2, 8, 64), Feedback.of(None, Settings(sweeps=1), 128)
    matrix = round_nested(weight, format, feedback, Nesting(), name="w")
    plain = format.encode(lambda start, stop: weight[start:stop], (32, 128))
    for width in (2, 3, 4, 5):
        error, nearest = (float((m.dequantize(width=width) - weight).square().mean()) for m in (matrix, plain))
        assert error < 1.25 * nearest
    weight[3, 4] = torch.inf
    with pytest.raises(KbitError, match="w: 1 weights are NaN or infinite"):
        round_nested(weight, format, feedback, Nesting(), name="w")


def test_methods_say_what_they_can_do() -> None:
    format = NestedFormat(2, 8, 64)
    assert TwoSided().refuses(format) is None
    assert "passes no errors on" in (ScaleSearch().refuses(format) or "")
    for method in ("hqq", "trellis", "trellis-plain", "trellis-tuned", "ldlq2-tuned"):  # each for one width
        assert "one width at a time; use ldlq2, gptq or rtn" in (get_method(method).refuses(format) or "")
    assert TwoSided().nested(Nesting(5)).settings["nesting"]["anchor"] == 5
    assert "nesting" not in TwoSided().settings


def test_arguments_that_do_not_fit_are_refused() -> None:
    levels = [torch.zeros(4), torch.zeros(8)]
    good = {
        "slopes": torch.zeros(2, 3, 5), "inputs": torch.eye(5), "outputs": torch.eye(3), "levels": levels,
        "weights": [1.0, 1.0], "block": 5, "scales": torch.ones(2, 3, 1), "codes": torch.zeros(3, 5, dtype=torch.uint8),
        "change": torch.zeros(2, 3, 5),
    }  # fmt: skip
    _native.descend_nested_rows(**good)
    for change in (
        {"levels": levels[::-1]},
        {"levels": levels[:1]},
        {"levels": [torch.zeros(4), torch.zeros(9)]},
        {"weights": [1.0]},
        {"scales": torch.ones(2, 3, 2)},
        {"codes": torch.full((3, 5), 8, dtype=torch.uint8)},
        {"block": 0},
    ):
        with pytest.raises(ValueError, match=r"widths|levels|shape|code|block"):
            _native.descend_nested_rows(**{**good, **change})


def test_the_command_anchors_a_width(tiny_model: Path) -> None:
    from kbit.quantizers.request import QuantizeRequest

    flags = QuantizeRequest(str(tiny_model), nested="2..6", anchor=5)
    flags.check()
    assert flags.chosen_method(flags.codec()).settings["nesting"]["anchor"] == 5
    high = QuantizeRequest(str(tiny_model), nested="5..8")
    assert high.chosen_method(high.codec()).settings["nesting"]["anchor"] == 5  # 4 is not there
    for wrong, message in (
        ({"anchor": 5}, "add --nested 2..8"),
        ({"nested": "2..4", "anchor": 5}, "nested2..4-b64 has 2 to 4 bits"),
        ({"format": "nf4-b64", "anchor": 5}, "add --nested 2..8 in place of --format"),
        (
            {"nested": "2..8", "method": "rtn", "anchor": 5},
            "--anchor: method rtn does not calibrate; use --method ldlq2",
        ),
        ({"nested": "2..4", "bits": 4}, "--bits: --nested 2..4 has every width"),
        ({"nested": "2..4", "dtype": "nf"}, "--dtype: --nested 2..4 has every width"),
        ({"nested": "2..4", "size": "80MB"}, "--size: --nested 2..4 has every width"),
        ({"nested": "2..4", "fast": True}, "--fast: --nested 2..4 has every width"),
        ({"nested": "2..4", "asymmetric": True}, "--asym: --nested 2..4 has every width"),
    ):
        bad = QuantizeRequest(str(tiny_model), **wrong)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match=message):
            bad.chosen_method(bad.codec())
    named = QuantizeRequest(str(tiny_model), format="nested2..6-b32", anchor=5)
    assert named.chosen_method(named.codec()).settings["nesting"]["anchor"] == 5
    assert np.isclose(sum(Nesting(3).weights([2, 3])), 1 + 4 * Nesting(3).emphasis)
