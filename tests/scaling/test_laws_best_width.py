"""The best width at a budget, choices, and what the conclusion makes of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from laws_cases import FAMILY, Size
from laws_cases import measure as measure_world

from kbit.scaling.laws.best_width import ANY, BestWidths
from kbit.scaling.laws.conclusion import (
    NO,
    NO_CLAIM,
    NOT_ENOUGH,
    TIED,
    YES,
    Finding,
    best_of,
    conclude,
    conclusion_text,
)
from kbit.scaling.laws.curves import REACH, Curve, make_curves
from kbit.scaling.laws.fit import Laws, fit_laws
from kbit.scaling.laws.forms import target
from kbit.scaling.laws.gaussian import gaussian_rounding
from kbit.scaling.laws.suites import make_suites
from kbit.scaling.points import Point

WIDE_FAMILY = tuple(
    Size(f"m{index}", 10**6 * 2**index, 10**7 * 2**index, 4.5 - 0.15 * index, 0.0) for index in range(5)
)
FORMATS = tuple(f"{dtype}{bits}-b{block}" for bits in (3, 4, 5, 6) for dtype in ("nf", "int") for block in (64, 128))


def measure(family: Sequence[Size] = FAMILY, formats: Sequence[str] = FORMATS, **options: Any) -> list[Point]:
    """laws_cases.measure with fewer formats."""
    return measure_world(family, formats, **options)


def best(laws: Laws, dtype: str = ANY, axis: str = "linear") -> BestWidths:
    found = best_of(laws.suites[0].best, "rtn", axis, dtype)
    assert found is not None
    return found


def finding(laws: Laws, topic: str) -> Finding:
    return next(found for found in conclude(laws) if found.topic == topic)


# Curves


def test_a_curve_is_read_linearly_in_the_logarithm_and_marked_beyond_its_ends() -> None:
    curve = Curve("rtn", "nf4-b64", "nf", 4, np.log([100.0, 1000.0, 10000.0]), (2, 0, 1))
    values = np.array([[3.0], [2.5], [4.0]])
    at = np.log([100.0, 316.2277660168379, 1000.0, 5000.0, 10000.0, 20000.0, 20001.0, 49.0, 50.1])
    read, outside = curve.read(values, at)
    third = 3 - 0.5 * (math.log10(5000) - 3)
    assert read[:6, 0] == pytest.approx([4, 3.5, 3, third, 2.5, 2.5 - 0.5 * math.log10(REACH)])
    assert np.isnan(read[6:8, 0]).all()
    assert read[8, 0] == pytest.approx(4 - math.log10(0.501))
    assert outside.tolist() == [False] * 5 + [True] * 4


def test_parabolas_are_read_exactly_and_meet_the_points() -> None:
    x = np.array([1.0, 2.0, 4.0, 5.0])
    curve = Curve("rtn", "nf4-b64", "nf", 4, x, (0, 1, 2, 3))
    at = np.array([1.0, 1.5, 2.0, 2.2, 3.9, 4.0, 4.7, 5.0])
    read, _ = curve.read((3 * x**2 - x + 1)[:, None], at, curved=True)
    assert read[:, 0] == pytest.approx(3 * at**2 - at + 1)
    other = np.array([[1.0], [5.0], [2.0], [3.0]])
    assert curve.read(other, x, curved=True)[0] == pytest.approx(other)


def test_one_point_is_no_curve() -> None:
    curve = Curve("rtn", "nf4-b64", "nf", 4, np.log([100.0]), (0,))
    read, outside = curve.read(np.array([[3.0]]), np.log([100.0, 101.0]))
    assert read[0, 0] == 3
    assert np.isnan(read[1, 0])
    assert outside.tolist() == [False, True]


def test_of_two_models_of_one_size_the_better_makes_the_curve() -> None:
    twin = Size("twin", FAMILY[0].linear, 10**7, 4.0, 0.4)
    points = measure([*FAMILY, twin], ["nf4-b64"])
    suite = make_suites(points)[0][0]
    nll = np.array([point.nll for point in suite.points])
    curve = next(curve for curve in make_curves(suite.points, "total", nll) if curve.format == "nf4-b64")
    assert [suite.points[row].model for row in curve.rows] == ["twin", "middle", "large"]


# Best widths


def test_the_best_width_is_that_of_the_draws_counted_by_hand() -> None:
    points = measure(WIDE_FAMILY, ["nf3-b64", "nf4-b64", "nf5-b64", "int4-b128"], noise=0.5)
    laws = fit_laws(points, draws=100)
    suite, drawn = laws.suites[0].suite, laws.suites[0].draws
    found = best(laws)
    assert found.widths == (3, 4, 5, 16)
    for budget in found.budgets[::5]:
        losses: dict[int, list[np.ndarray]] = {}
        for format in dict.fromkeys(point.format for point in points):
            rows = [row for row, point in enumerate(suite.points) if point.format == format]
            x = np.log([suite.points[row].linear_bits for row in rows])
            if x[0] <= math.log(budget.bits) <= x[-1]:
                values = [np.interp(math.log(budget.bits), x, drawn.nll[rows, draw]) for draw in range(1, 101)]
                losses.setdefault(suite.points[rows[0]].bits, []).append(np.array(values))
        inside = {cell.bits: cell for cell in budget.cells if not cell.extrapolated}
        assert set(inside) == set(losses)
        if len(losses) == len(budget.cells):
            per_width = np.array([np.min(losses[cell.bits], axis=0) for cell in budget.cells])
            wins = np.bincount(per_width.argmin(axis=0), minlength=len(budget.cells)) / 100
            assert [cell.probability for cell in budget.cells] == pytest.approx(wins)
        assert sum(cell.probability for cell in budget.cells) == pytest.approx(1)


@pytest.mark.parametrize("width", [3, 4, 5])
def test_a_world_made_for_a_width_has_it_as_its_best(width: int) -> None:
    def law(size: Size, format: str) -> float:  # worthless below the width, perfect from it on
        return math.log(2.0 if target(format, "rtn").bits < width else 1e-4)

    laws = fit_laws(measure(WIDE_FAMILY, log_kl=law, embedding=0), draws=100)
    found = best(laws)
    assert found.k_star[0].bits == width
    assert found.k_star[0].probability > 0.95
    assert not any(star.tied for star in found.k_star[1:])
    assert found.curved == width
    assert {bits for _, bits in found.without} == {width}
    assert found.window is not None
    assert found.window[0] < found.window[1]
    four = finding(laws, "four bits")
    assert four.holds == (YES if width == 4 else NO)
    assert finding(laws, "best width").holds == YES
    assert f"{width} bits has the lowest loss, with probability above 99 %" in finding(laws, "best width").text


def test_equal_widths_are_tied() -> None:
    # One bit less is worth ln(4.25 / 3.25) of size, 0.15 / ln 2 nats each: the loss that 3 bits adds makes up for it.
    worth = 0.15 / math.log(2) * math.log(4.25 / 3.25)

    def law(size: Size, format: str) -> float:
        bits = target(format, "rtn").bits
        return math.log({2: 3.0, 3: worth + 1e-4}.get(bits, 1e-4))

    points = measure(WIDE_FAMILY, ["int2-b64", "int3-b64", "int4-b64", "int5-b64"], log_kl=law, noise=0.3, embedding=0)
    laws = fit_laws(points, draws=300)
    found = best(laws)
    assert {star.bits for star in found.k_star if star.tied} == {3, 4}
    assert 0.02 < found.k_star[0].probability < 0.98
    told = finding(laws, "best width")
    assert told.holds == TIED
    assert "cannot be told from it" in told.text


def test_extrapolation_is_marked_and_supports_nothing() -> None:
    laws = fit_laws(measure(WIDE_FAMILY), draws=50)
    found = best(laws)
    ends = {bits: [] for bits in found.widths}
    for point in laws.suites[0].suite.points:
        ends[point.bits].append(point.linear_bits)
    for budget in found.budgets:
        for cell in budget.cells:
            inside = min(ends[cell.bits]) <= budget.bits * (1 + 1e-9) and budget.bits <= max(ends[cell.bits]) * (
                1 + 1e-9
            )
            assert cell.extrapolated != inside
        if budget.supported:
            at = found.widths.index(budget.best)
            near = found.widths[max(0, at - 1) : at + 2]
            assert {cell.bits for cell in budget.cells if not cell.extrapolated} >= set(near)
    assert not found.budgets[-1].supported
    assert any(cell.extrapolated for budget in found.budgets for cell in budget.cells)


def test_too_few_models_or_widths_are_said() -> None:
    one = fit_laws(measure(FAMILY[:1]), draws=20)
    assert "one model" in best(one).why
    assert not best(one).budgets
    assert finding(one, "best width").holds == NOT_ENOUGH
    assert finding(one, "four bits").holds == NOT_ENOUGH
    narrow = fit_laws(measure(WIDE_FAMILY, ["nf4-b64"], originals=False), draws=20)
    assert "one width" in best(narrow).why
    apart = [Size("a", 10**6, 10**7, 4.5, 0.0), Size("b", 10**6 + 1, 10**7, 4.4, 0.0)]
    assert best(fit_laws(measure(apart), draws=20)).window is None


def test_a_quantized_original_is_not_the_unquantized_choice() -> None:
    points = [replace(point, bits=5) if point.is_original else point for point in measure(WIDE_FAMILY)]
    found = best(fit_laws(points, draws=20))
    assert 16 not in found.widths
    assert all(cell.format != "original" for budget in found.budgets for cell in budget.cells)


def test_axes_count_different_bits() -> None:
    laws = fit_laws(measure(WIDE_FAMILY, embedding=4_000_000), draws=50)
    linear, total = best(laws, axis="linear"), best(laws, axis="total")
    assert total.budgets[0].bits - linear.budgets[0].bits == pytest.approx(64_000_000)
    # What the embedding takes does not shrink with the width, so wide formats of small models gain less from it.
    assert total.k_star[0].bits >= linear.k_star[0].bits


# Conclusions


def test_data_types_are_ranked_as_the_world_has_them() -> None:
    laws = fit_laws(measure(WIDE_FAMILY), draws=100)
    told = {found.text.split(" bits")[0][-1]: found for found in conclude(laws) if found.topic == "data types"}
    for bits in ("3", "4"):
        ratio = np.mean(
            [
                math.log(gaussian_rounding(f"nf{bits}-b{block}").error / gaussian_rounding(f"int{bits}-b{block}").error)
                for block in (64, 128)
            ]
        )
        assert f"nf {math.exp(ratio):.2f}"[:5] in told[bits].text
        assert told[bits].holds == YES

    def reversed_law(size: Size, format: str) -> float:
        seen = target(format, "rtn")
        return size.constant - seen.bits - (1 if seen.dtype == "int" else 0)

    other = fit_laws(measure(WIDE_FAMILY, log_kl=reversed_law), draws=100)
    assert next(found for found in conclude(other) if found.topic == "data types").holds == NO
    lonely = fit_laws(measure(WIDE_FAMILY, ["nf4-b64", "nf3-b64"]), draws=20)
    assert finding(lonely, "data types").holds == NOT_ENOUGH


def test_block_sizes_are_compared_at_equal_bits() -> None:
    def law(size: Size, format: str) -> float:  # large blocks ruin 3 bits and make no difference elsewhere
        bits = target(format, "rtn").bits
        return math.log(0.5 if bits == 3 and not format.endswith("b64") else 0.01)

    def told(large: int) -> dict[str, Finding]:
        formats = [f"int{bits}-b{block}" for bits in (3, 4, 6) for block in (64, large)]
        laws = fit_laws(measure(WIDE_FAMILY, formats, log_kl=law), draws=100)
        return {found.text[0]: found for found in conclude(laws) if found.topic == "block size"}

    far = told(1024)
    assert "small blocks pay" in far["3"].text
    assert "large blocks are better" in far["6"].text
    assert [far[bits].holds for bits in "346"] == [YES, NO, YES]
    assert [told(128)[bits].holds for bits in "346"] == [NO_CLAIM] * 3


def test_a_lopsided_codebook_is_found_out() -> None:
    def law(size: Size, format: str) -> float:
        return math.log(gaussian_rounding(format).noise) + (math.log(5) if format.startswith("nf2") else 0.0)

    laws = fit_laws(measure(WIDE_FAMILY, [*FORMATS, "nf2-b64"], log_kl=law, noise=0.02), draws=50)
    assert "nf2-b64 5.0 times" in finding(laws, "biased formats").text
    assert not [
        found for found in conclude(fit_laws(measure(WIDE_FAMILY), draws=20)) if found.topic == "biased formats"
    ]


def test_methods_are_named_where_there_are_several() -> None:
    both = [*measure(WIDE_FAMILY), *[p for p in measure(WIDE_FAMILY, method="gptq") if not p.is_original]]
    laws = fit_laws(both, draws=20)
    starts = {found.text.partition(":")[0] for found in conclude(laws)}
    assert starts == {"rtn", "gptq"}
    assert {found.method for found in laws.suites[0].best} == {"rtn", "gptq"}


def test_the_text_says_what_was_found_and_what_was_not() -> None:
    laws = fit_laws(measure(FAMILY), draws=100)
    text = conclusion_text(laws)
    for found in conclude(laws):
        assert (found.text in text) == found.main
    assert len(text) < 4000
    assert 'models as they are: "chinchilla"' in text.partition("Not said: ")[2]
    assert "nan" not in text.lower()
    assert "inf" not in text.lower()
    assert conclusion_text(fit_laws([])).startswith("Nothing was measured")
    bad: list[Point] = [replace(point, nll=math.nan) for point in measure(FAMILY[:1], ["nf4-b64"])]
    assert "not a number" in conclusion_text(fit_laws(bad))
