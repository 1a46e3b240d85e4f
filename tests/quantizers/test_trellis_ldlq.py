"""Rounding to a trellis tile by tile: against its definition in plain loops, and what feedback and fitted scales buy."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kbit.calibration.factors import Factors
from kbit.formats.quant_format import QuantFormat
from kbit.formats.registry import parse_format
from kbit.formats.rotation import new_signs, rotate
from kbit.formats.trellis import TrellisFormat
from kbit.formats.trellis_code import TileFactors, search, tile_levels
from kbit.host.errors import KbitError, UnsupportedError
from kbit.quantizers import trellis_ldlq
from kbit.quantizers.rounding import Rounder
from kbit.quantizers.settings import Settings
from kbit.quantizers.trellis_ldlq import TileFeedback, round_trellis

ONE_SIDED, TWO_SIDED, WITHIN = Settings(two_sided=False), Settings(), Settings(within_tiles=True)


def case(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, Factors]:
    """A matrix with rows of different size, and factors of correlated inputs and outputs."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * (0.2 + torch.rand(rows, 1, generator=generator))
    inputs = torch.randn(columns, columns, generator=generator) * torch.linspace(0.1, 2, columns)
    outputs = torch.randn(rows, rows, generator=generator) * torch.linspace(0.1, 2, rows)
    return weight, Factors(inputs @ inputs.T / columns, outputs @ outputs.T / rows)


def plain_rounding(
    weight: torch.Tensor, format: TrellisFormat, feedback: TileFeedback, scales: torch.Tensor
) -> torch.Tensor:
    """The codes of a matrix whose rows and columns are whole tiles, one tile after the other from the last to the first."""
    rotated = rotate(weight, feedback.signs, format.columns_mixed(weight.shape[1]))
    high, wide = rotated.shape[0] // 16, rotated.shape[1] // 16
    lower, below = feedback.columns, feedback.rows
    assert lower is not None
    if below is None:
        below = torch.eye(rotated.shape[0])
    error = torch.zeros_like(rotated)
    strings = torch.empty(high, wide, 32 * format.bits, dtype=torch.uint8)
    factors = None
    for i in reversed(range(high)):
        for j in reversed(range(wide)):
            rows, columns = slice(16 * i, 16 * i + 16), slice(16 * j, 16 * j + 16)
            heard = error @ lower  # (E L): of this row of tiles, without this tile and those to its left
            target = rotated[rows, columns] + heard[rows, columns]
            target = target + below[16 * i + 16 :, rows].T @ heard[16 * i + 16 :, columns]
            if feedback.within is not None:
                size = scales[rows]
                factors = TileFactors.of(feedback.within[0][j : j + 1], feedback.within[1][i : i + 1] * size / size.T)
            string = search(format, (target / scales[rows]).reshape(1, 256), 1, factors)
            strings[i, j] = string[0]
            values = tile_levels(format, string)[0].float() * (format.step * scales[rows])
            error[rows, columns] = rotated[rows, columns] - values
    return strings


@pytest.mark.parametrize("settings", [ONE_SIDED, TWO_SIDED, WITHIN], ids=["one-sided", "two-sided", "within tiles"])
@pytest.mark.parametrize("shape", [(48, 32), (16, 80), (64, 64)])
def test_tiles_are_rounded_as_the_definition_says(shape: tuple[int, int], settings: Settings) -> None:
    weight, factors = case(*shape)
    format = TrellisFormat(3, window=8)
    feedback = TileFeedback.of(factors, settings, shape[1], format)
    with pytest.MonkeyPatch.context() as patch:
        # Scales as given, not fitted.
        patch.setattr(trellis_ldlq, "_refitted", lambda rotated, scales, *others: scales)
        rounded = round_trellis(weight, format, feedback, replace(settings, search=False))
    expected = plain_rounding(weight, format, feedback, rounded.stored["scales"].float())
    # Sums in another order may tip single tiles, and with them those they are passed on to: the first ones are the same.
    same = (rounded.stored["codes"] == expected).all(dim=-1)
    assert bool(same[-1, -1])
    assert float(same.float().mean()) > 0.9


@pytest.mark.parametrize("text", ["trellis2-l12", "trellis2-sum4-l12", "trellis3-l12", "trellis4-l12", "trellis8"])
def test_what_is_passed_on_is_made_good(text: str) -> None:
    weight, factors = case(90, 150)
    format = parse_format(text)
    costs = []
    for settings in (Settings(feedback=False), ONE_SIDED, TWO_SIDED, WITHIN):
        rounded = Rounder(factors, settings, 150).round(weight, format)
        assert rounded.format == format
        costs.append(factors.divergence(weight - rounded.dequantize()))
    assert costs[0] > 1.3 * costs[1] > 1.3 * 1.05 * costs[2]
    # Integers pass nothing on within tiles.
    assert costs[3] < 0.97 * costs[2] if text != "trellis8" else costs[3] == costs[2]


@pytest.mark.parametrize("settings", [ONE_SIDED, WITHIN], ids=["one-sided", "within tiles"])
def test_a_giant_that_is_kept_apart_costs_nothing(settings: Settings) -> None:
    """One weight of hundreds of times its row's size: with it in the codes all of the matrix suffers."""
    weight, factors = case(96, 256)
    plain = Rounder(factors, settings, 256).round(weight, TrellisFormat(4, window=12))
    expected = factors.divergence(weight - plain.dequantize())
    weight[17, 200] = 480 * weight.square().mean().sqrt()
    costs = {}
    for outliers in (0, 4):
        format = TrellisFormat(4, window=12, outliers=outliers)
        rounded = Rounder(factors, settings, 256).round(weight, format)
        costs[outliers] = factors.divergence(weight - rounded.dequantize())
    assert costs[4] < 1.1 * expected < 0.15 * costs[0]


def test_factors_within_tiles_are_those_of_what_a_tile_adds() -> None:
    """What columns of tiles count given those to their left, and rows given those above: a Schur complement."""
    _, factors = case(40, 64)
    format = TrellisFormat(3, window=8)
    feedback = TileFeedback.of(factors, WITHIN, 64, format)
    assert feedback.within is not None
    assert feedback.inputs is not None
    assert feedback.outputs is not None
    assert TileFeedback.of(factors, ONE_SIDED, 64, format).within is None
    for known, upper in ((feedback.inputs, feedback.within[0]), (feedback.outputs, feedback.within[1])):
        assert len(upper) == len(known) // 16
        for tile, unit in enumerate(upper.double()):
            own, left = slice(16 * tile, 16 * tile + 16), slice(0, 16 * tile)
            beside = known[left, own].double()
            block = known[own, own].double() - beside.T @ torch.linalg.solve(known[left, left].double(), beside)
            assert torch.equal(unit.diagonal(), torch.ones(16, dtype=torch.float64))
            assert not unit.tril(-1).any()
            middle = torch.linalg.solve(unit, torch.linalg.solve(unit, block).T)
            assert float((middle - middle.diagonal().diag()).abs().max()) < 1e-3 * float(block.diagonal().mean())


def test_rows_of_zeros_tell_others_nothing() -> None:
    weight, factors = case(48, 32)
    weight[[3, 20]] = 0
    rounded = Rounder(factors, WITHIN, 32).round(weight, parse_format("trellis3-l8"))
    values = rounded.dequantize()
    assert bool(torch.isfinite(values).all())
    assert not values[[3, 20]].any()
    others = [row for row in range(48) if row not in (3, 20)]
    assert float((weight - values)[others].square().mean()) < 0.1 * float(weight[others].square().mean())


def test_fitted_scales_cost_less(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, factors = case(96, 128, seed=1)
    format, fitted = TrellisFormat(2, window=8), trellis_ldlq._refitted
    for settings in (ONE_SIDED, TWO_SIDED):
        feedback = TileFeedback.of(factors, settings, 128, format)
        costs = []
        for fit in (fitted, lambda rotated, scales, *others: scales):
            monkeypatch.setattr(trellis_ldlq, "_refitted", fit)
            rotated = rotate(weight, feedback.signs, 128)
            rounded = round_trellis(weight, format, feedback, settings)
            assert feedback.inputs is not None
            error = rotated - format.decode_rotated(rounded, slice(0, 96))
            outputs = torch.eye(96) if feedback.outputs is None else feedback.outputs
            costs.append(float(((outputs @ error @ feedback.inputs) * error).sum()))
        assert costs[0] < costs[1]


def test_threads_do_not_matter() -> None:
    weight, factors = case(64, 96)
    format = TrellisFormat(2, window=12)
    feedback = TileFeedback.of(factors, TWO_SIDED, 96, format)
    one = round_trellis(weight, format, feedback, TWO_SIDED, threads=1)
    for threads in (2, 5):
        other = round_trellis(weight, format, feedback, TWO_SIDED, threads=threads)
        assert all(torch.equal(other.stored[name], one.stored[name]) for name in one.stored)


@pytest.mark.parametrize("factors", [None, Factors(torch.zeros(40, 40), torch.zeros(20, 20))])
def test_what_says_nothing_of_errors_changes_nothing(factors: Factors | None) -> None:
    weight, _ = case(20, 40)
    format = parse_format("trellis4-l12")
    rounded = Rounder(factors, Settings(search=False, within_tiles=True), 40).round(weight, format)
    plain = format.encode(lambda start, stop: weight[start:stop], (20, 40))
    assert torch.equal(rounded.stored["codes"], plain.stored["codes"])


def test_what_cannot_be_rounded_is_said() -> None:
    weight, factors = case(20, 40)
    rounder = Rounder(factors, TWO_SIDED, 40)
    weight[3, 4] = torch.inf
    with pytest.raises(KbitError, match="q: 1 weights are NaN or infinite"):
        rounder.round(weight, parse_format("trellis3-l12"), name="q")
    with pytest.raises(UnsupportedError, match="q: no calibrated method rounds to"):
        rounder.round(weight, object(), name="q")  # type: ignore[arg-type]


def test_rows_are_joined_where_they_are() -> None:
    _, factors = case(20, 40)
    assert not Rounder(factors, ONE_SIDED, 40).rows_apart(parse_format("trellis3"))
    assert Rounder(factors, ONE_SIDED, 40).rows_apart(QuantFormat("nf", 4))
    assert not Rounder(factors, TWO_SIDED, 40).rows_apart(QuantFormat("nf", 4))


def test_signs_are_those_of_every_matrix_of_an_input() -> None:
    weight, factors = case(20, 40)
    rounded = Rounder(factors, TWO_SIDED, 40).round(weight, parse_format("trellis3-l12"))
    assert torch.equal(rounded.stored["signs"], new_signs(40))
