"""What pictures are made of: which points compare, frontiers, intervals and ratios."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_cases import make_point, make_sweep

from kbit.evaluate.statistics import Clusters, bootstrap_interval
from kbit.scaling.points import ORIGINAL
from kbit.scaling.report import plots_style as style
from kbit.scaling.report.plots_data import (
    DRAWS,
    frontier,
    interval,
    kl_draws,
    kl_ratio,
    kl_ratio_at_equal_bits,
    make_views,
)


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 20)), min_size=1, max_size=30))
def test_frontier_is_what_nothing_beats(cells: list[tuple[int, int]]) -> None:
    points = [
        make_point(model_id=str(place), total_bits=bits, nll=float(loss)) for place, (bits, loss) in enumerate(cells)
    ]
    (view,) = make_views(points)
    found = {(p.total_bits, p.nll) for p in frontier(view, lambda p: p.total_bits)}
    others = {(float(bits), float(loss)) for bits, loss in cells}
    unbeaten = {
        (bits, loss)
        for bits, loss in others
        if not any((b, n) != (bits, loss) and b <= bits and n <= loss for b, n in others)
    }
    assert found == unbeaten


def test_intervals_are_those_of_the_statistics() -> None:
    point = make_point()
    sizes, _, sums = point.clusters()
    assert interval(kl_draws([point])[0]) == pytest.approx(bootstrap_interval(Clusters(sums, sizes), draws=DRAWS))


def test_ratio_of_a_point_to_itself_is_certain() -> None:
    point = make_point()
    same = kl_ratio(replace(point, format="int4-b64"), point)
    assert same is not None
    assert (same.value, same.low, same.high) == (1.0, 1.0, 1.0)
    assert not same.differs


def test_ratio_cancels_the_text() -> None:
    """Twice the divergence on every cluster: the ratio is 2 on every text, however much the clusters differ."""
    point = make_point()
    twice = replace(point, kl=2 * point.kl, cluster_kl=tuple(2 * value for value in point.cluster_kl))
    ratio = kl_ratio(twice, point)
    assert ratio is not None
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((2.0, 2.0, 2.0))
    assert ratio.differs


def test_ratio_at_equal_bits_reads_the_curve_between_its_points() -> None:
    curve = [make_point(format=f"int{bits}-b128", kl=4.0**-bits) for bits in (2, 3, 4)]
    on_curve = make_point(format="int2-b32", kl=4.0**-2.375)  # 2.5 bits a weight, 0.375 beyond the first of the curve
    ratio = kl_ratio_at_equal_bits(on_curve, curve)
    assert ratio is not None
    assert ratio.value == pytest.approx(1.0, rel=1e-6)
    assert kl_ratio_at_equal_bits(make_point(format="int4-b64", kl=0.01), curve) is None  # beyond the curve's end


def test_no_ratio_of_nothing_and_no_interval_of_one_cluster() -> None:
    assert kl_ratio(make_point(kl=0.0), make_point()) is None
    single = make_point(cluster_tokens=(1200.0,), cluster_nll=(3600.0,), cluster_kl=(12.0,))
    ratio = kl_ratio(single, single)
    assert ratio is not None
    assert ratio.low is None
    assert not ratio.differs


def test_of_a_row_measured_twice_the_latest_counts() -> None:
    old, new = make_point(nll=3.0), make_point(nll=4.0, created="2026-02-01T00:00:00+00:00")
    for points in ([old, new], [new, old]):
        (view,) = make_views(points)
        assert [point.nll for point in view.points] == [4.0]


def test_texts_and_tokenizers_and_arithmetic_are_kept_apart() -> None:
    points = make_sweep(models=(("a", 10**6),), widths=(4,))
    other_text = [replace(point, data_sha256="e" * 64, data="other.txt") for point in points[:2]]
    views = make_views(points + other_text)
    assert [view.name for view in views] == ["book.txt", "other.txt"]
    other_tokenizer = [replace(point, tokenizer="u", model="b", model_id="b") for point in points]
    (view,) = make_views(points + other_tokenizer)
    assert view.per_byte
    assert view.unit == "nats per byte"
    assert view.loss(points[0]) == pytest.approx(points[0].nll * 1200 / 4800)
    assert len(view.families) == 2
    int8 = [replace(point, backend=point.backend.replace("fp32 compute", "int8 compute")) for point in points]
    (view,) = make_views(points + int8)
    assert len(view.models) == 2
    assert sorted(model.label for model in view.models) == ["a, fp32", "a, int8"]


def test_models_of_one_name_get_labels_of_their_own() -> None:
    points = [make_point("x/model", model_id="1" * 64), make_point("y/model", model_id="2" * 64)]
    (view,) = make_views(points)
    assert sorted(model.label for model in view.models) == ["model (111111)", "model (222222)"]


def test_rows_without_a_finite_loss_are_not_drawn() -> None:
    (view,) = make_views([make_point("a", ORIGINAL), make_point("a", nll=math.nan), make_point("a", "int4-b64")])
    assert [point.format for point in view.quantized] == ["int4-b64"]
    assert view.best(view.models[0], 4) is view.quantized[0]
    assert view.best(view.models[0], 3) is None


@given(st.floats(-12, 12), st.floats(0.05, 12), st.integers(2, 10))
def test_ticks_are_few_and_inside(start: float, length: float, most: int) -> None:
    low, high = 10.0**start, 10.0 ** (start + length)
    ticks = style.log_ticks(low, high, most)
    assert len(ticks) <= most
    assert ticks == sorted(set(ticks))
    assert all(low <= tick <= high for tick in ticks)
    if length > 1.1:
        assert ticks


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.0001, "0.0001"), (0.05, "0.05"), (3.0, "3"), (1500.0, "1,500"), (2e-5, "2e-5"), (3e7, "3e7")],
)
def test_numbers_on_axes(value: float, text: str) -> None:
    assert style.plain(value) == text


def test_names_in_pictures_are_short_and_harmless() -> None:
    assert style.shown("\x1b[31m\u202ename\n") == "?[31m?name?"
    assert len(style.shown("x" * 500)) == 28
    assert not style.shown("_hidden").startswith("_")
    assert style.shown("") == "(no name)"


def test_colours_stay_with_their_data_type() -> None:
    alone, together = style.dtype_colors(["nf"]), style.dtype_colors(["float-paper", "int", "nf", "new"])
    assert alone["nf"] == together["nf"]
    assert len(set(together.values())) == 4
    assert len({style.width_color(bits) for bits in range(2, 9)}) == 7
    assert len({style.width_mark(bits) for bits in range(2, 9)}) == 7


def test_limits_hold_their_values() -> None:
    values = [1e-9, 3.0, 2e4]
    low, high = style.log_limits(values)
    assert low < min(values)
    assert high > max(values)
    low, high = style.log_limits([5.0])
    assert low < 5.0 < high
    assert np.isfinite([low, high]).all()
