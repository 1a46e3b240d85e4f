"""The paper's claims, checked on points whose answer is known, and on a real model's."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kbit.formats.quant_format import QuantFormat
from kbit.host.errors import KbitError
from kbit.scaling.claims import Claim, Comparison, check_claims, kl_draws
from kbit.scaling.points import ORIGINAL, Point, append_points, read_points

CLUSTERS = 20
TOKENS = 100.0
HARDNESS = np.random.default_rng(1).uniform(0.5, 1.5, CLUSTERS)


def make_point(format: str, kl: float, *, method: str = "rtn", model: str = "made", spread: float = 0.0) -> Point:
    """A point of so much KL, spread over the clusters as their hardness says; `spread` adds noise of its own."""
    parsed = QuantFormat.parse(format)
    noise = np.random.default_rng(len(format)).normal(0.0, spread, CLUSTERS) if spread else 0.0
    by_cluster = kl * TOKENS * (HARDNESS / HARDNESS.mean() + noise)
    block = parsed.block_size or 1024
    bits = parsed.bits + 16 / block + (0.24 if method == "outliers" else 0.0)
    return Point(
        key=f"{model}/{method}/{format}",
        model=model,
        model_id=model,
        tokenizer="words",
        method=method,
        format=str(parsed),
        dtype=parsed.dtype,
        bits=parsed.bits,
        block_size=parsed.block_size,
        linear_parameters=1 << 20,
        parameters=1 << 21,
        linear_bits=round(bits * (1 << 20)),
        total_bits=round((bits + 16) * (1 << 20)),
        training_tokens=None,
        data="text",
        data_sha256="0" * 64,
        convention="gptq",
        context=128,
        tokens=int(CLUSTERS * TOKENS),
        text_bytes=8000,
        backend="reference",
        nll=3.0 + kl,
        kl=float(by_cluster.sum() / (CLUSTERS * TOKENS)),
        top1=0.9,
        weight_error=0.01,
        cluster_tokens=(TOKENS,) * CLUSTERS,
        cluster_nll=tuple((3.0 * TOKENS + by_cluster).tolist()),
        cluster_kl=tuple(by_cluster.tolist()),
        quantize_seconds=0.1,
        evaluate_seconds=1.0,
        created="2026-01-01T00:00:00+00:00",
    )


def claims_of(points: list[Point]) -> dict[str, Claim]:
    return {claim.name: claim for claim in check_claims(points)}


class TestVerdicts:
    def test_nothing_measured(self) -> None:
        for claim in check_claims([]):
            assert claim.verdict == "not measured"
            assert claim.needs.startswith("--")

    @pytest.mark.parametrize(
        ("holds", "verdict"),
        [
            ([True, None], "holds"),
            ([False, None], "does not hold"),
            ([None], "too close to tell"),
            ([True, True, True, False], "mostly holds"),
            ([True, True, False], "mixed"),
        ],
    )
    def test_words(self, holds: list[bool | None], verdict: str) -> None:
        claim = Claim("x", "y", tuple(Comparison("m", "w", each, "e") for each in holds), "--z")
        assert claim.verdict == verdict
        assert claim.to_dict()["verdict"] == verdict
        assert sum(claim.counts) == len(holds)

    def test_order_of_data_types(self) -> None:
        points = [make_point("nf4-b64", 0.010), make_point("float4-b64", 0.012), make_point("int4-b64", 0.0123)]
        found = claims_of(points)["data type"]
        # The last two differ by 2.5 %: certain, since they were drawn alike, and too little to matter.
        assert [comparison.holds for comparison in found.comparisons] == [True, None]
        reversed_ = [make_point("nf4-b64", 0.012), make_point("float4-b64", 0.010)]
        assert claims_of(reversed_)["data type"].verdict == "does not hold"

    def test_noise_is_not_a_difference(self) -> None:
        points = [make_point("nf4-b64", 0.010, spread=2.0), make_point("float4-b64", 0.011, spread=2.0)]
        assert claims_of(points)["data type"].verdict == "too close to tell"

    @pytest.mark.parametrize(("fine", "holds"), [(0.020, True), (0.038, False)])
    def test_blocks_against_width(self, fine: float, holds: bool) -> None:
        """The width falls by ln 4 a bit; blocks of 64 cost 0.23 bits more than rows of 1024."""
        points = [make_point("nf3-row", 0.04), make_point("nf4-row", 0.01), make_point("nf3-b64", fine)]
        (comparison,) = claims_of(points)["block size"].comparisons
        assert comparison.holds is holds
        assert f"{math.log(4):.3g}"[:3] in comparison.evidence

    def test_wide_formats(self) -> None:
        points = [make_point("int6-b64", 0.001), make_point("nf6-b64", 0.002)]
        assert claims_of(points)["6 to 8 bits"].verdict == "holds"
        points.append(make_point("dynamic6-b64", 0.2))
        assert claims_of(points)["6 to 8 bits"].verdict == "does not hold"

    @pytest.mark.parametrize(("three", "verdict"), [(0.9, "holds"), (0.1, "does not hold")])
    def test_three_bits(self, three: float, verdict: str) -> None:
        points = [make_point("nf3-b64", three), make_point("nf4-b64", 0.04), make_point("nf5-b64", 0.01)]
        assert claims_of(points)["3 bits break down"].verdict == verdict

    def test_exponents(self) -> None:
        points = [make_point("float4e2m1-b64", 0.01), make_point("float4e3m0-b64", 0.03)]
        assert claims_of(points)["exponent bits"].verdict == "holds"
        points = [make_point("float5e3m1-b64", 0.01), make_point("float5e2m2-b64", 0.005)]
        assert claims_of(points)["exponent bits"].verdict == "does not hold"
        grids = [make_point("float4e2m1-b64-paper", 0.01), make_point("float4e3m0-b64", 0.03)]
        assert claims_of(grids)["exponent bits"].verdict == "not measured"

    def test_outliers(self) -> None:
        points = [make_point(f"int{bits}-b64", 0.64 / 4 ** (bits - 2)) for bits in (3, 4, 5)]
        points += [
            make_point("int3-b64", 0.08, method="outliers"),
            make_point("int4-b64", 0.039, method="outliers"),
        ]
        found = claims_of(points)
        assert found["outliers at 3 bits"].verdict == "holds"
        assert found["outliers at 4 bits"].verdict == "holds"

    def test_texts_and_models_do_not_mix(self) -> None:
        first, second = make_point("nf4-b64", 0.010), make_point("float4-b64", 0.012)
        assert claims_of([first, replace(second, data_sha256="1" * 64)])["data type"].verdict == "not measured"
        assert claims_of([first, replace(second, model_id="other")])["data type"].verdict == "not measured"


def test_draws_pair() -> None:
    """Twice the loss in every cluster is twice the loss in every draw."""
    one, two = kl_draws(make_point("nf4-b64", 0.01)), kl_draws(make_point("nf3-b64", 0.02))
    np.testing.assert_allclose(two / one, 2.0, rtol=1e-12)
    assert one[0] == pytest.approx(0.01)
    assert one[1:].std() > 0


class TestTable:
    def test_rows_come_back(self, tmp_path: Path) -> None:
        path = tmp_path / "deep" / "points.jsonl"
        points = [make_point("nf4-b64", 0.01), make_point("int8-row", 1e-5)]
        append_points(path, points[:1])
        append_points(path, points[1:])
        assert read_points(path) == points
        assert read_points(tmp_path / "none.jsonl") == []

    def test_the_latest_row_of_a_key_counts(self, tmp_path: Path) -> None:
        path = tmp_path / "points.jsonl"
        append_points(path, [make_point("nf4-b64", 0.01), make_point("nf4-b64", 0.02)])
        assert [point.kl for point in read_points(path)] == [pytest.approx(0.02)]

    @pytest.mark.parametrize("cut", [1, 2, 100])
    def test_a_half_written_row_is_passed_over_and_cut_off(self, tmp_path: Path, cut: int) -> None:
        path = tmp_path / "points.jsonl"
        points = [make_point(f"nf{bits}-b64", 0.01) for bits in (2, 3, 4)]
        append_points(path, points[:2])
        path.write_bytes(path.read_bytes()[:-cut])
        assert read_points(path) == points[:1]
        append_points(path, points[2:])
        assert read_points(path) == [points[0], points[2]]

    def test_a_file_of_one_half_row(self, tmp_path: Path) -> None:
        path = tmp_path / "points.jsonl"
        path.write_text('{"schema": 1, "key')
        assert read_points(path) == []
        append_points(path, [make_point("nf4-b64", 0.01)])
        assert len(read_points(path)) == 1

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ('"schema": 1', '"schema": 7', "not a row of schema 1"),
            ('"bits": 4', '"bits": "4"', "bits is '4'"),
            ('"nll": 3.01', '"nll": null', "nll is None"),
            ('"model": "made"', '"model": 3', "model is 3"),
            ('{"schema"', '{"schema', "not JSON"),
            ('"cluster_kl": [', '"cluster_kl": ["a", ', "cluster_kl is"),
        ],
    )
    def test_a_wrong_row_is_named(self, tmp_path: Path, old: str, new: str, message: str) -> None:
        path = tmp_path / "points.jsonl"
        append_points(path, [make_point("nf3-b64", 0.02), make_point("nf4-b64", 0.01)])
        lines = path.read_text().splitlines()
        assert old in lines[1]
        path.write_text(lines[0] + "\n" + lines[1].replace(old, new) + "\n")
        with pytest.raises(KbitError, match=f"line 2: .*{message}"):
            read_points(path)

    def test_what_a_row_derives(self) -> None:
        point = make_point("nf4-b64", 0.01)
        assert point.bits_per_weight == 4.25
        assert point.nll_per_byte == pytest.approx(point.nll / 4)
        assert point.perplexity == pytest.approx(math.exp(3.01))
        assert replace(point, nll=1e4).perplexity == math.inf
        assert '"perplexity": null' in replace(point, nll=1e4).to_json()
        assert replace(point, format=ORIGINAL).is_original
        assert not point.is_original
