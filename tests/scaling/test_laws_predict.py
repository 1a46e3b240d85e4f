"""Predictions: right where the law holds, wide where nobody knows, and an error where nothing bears on the question."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from laws_cases import FAMILY, FORMATS, Size, measure

from kbit.host.errors import KbitError, UsageError
from kbit.scaling.laws.bootstrap import interval
from kbit.scaling.laws.fit import Laws, fit_laws
from kbit.scaling.laws.forms import target
from kbit.scaling.laws.gaussian import gaussian_rounding
from kbit.scaling.laws.predict import MEASURED, Query, predict
from kbit.scaling.points import ORIGINAL, Point


@pytest.fixture(scope="module")
def laws() -> Laws:
    return fit_laws(measure(), draws=400)


def test_what_was_measured_is_returned(laws: Laws) -> None:
    point = laws.suites[0].suite.points[5]
    for name in (point.model, point.model_id):
        found = predict(laws, Query(point.format, model=name))
        assert (found.basis, found.extrapolated) == (MEASURED, ())
        assert found.nll == pytest.approx(point.nll)
        assert found.kl == pytest.approx(point.kl)
        assert found.delta == pytest.approx(point.nll - laws.suites[0].suite.points[0].nll)
        assert found.delta_low < found.delta < found.delta_high
        assert found.nll_per_byte == pytest.approx(point.nll_per_byte)
    own = predict(laws, Query(ORIGINAL, model=point.model))
    assert own.delta == own.kl == own.delta_high == 0


def test_format_strings_are_the_same_however_written(laws: Laws) -> None:
    assert predict(laws, Query("NF4-B64", model="small")).basis == MEASURED


def test_formats_that_were_not_measured_are_predicted_within_their_intervals() -> None:
    new = ["float3e2m0-b64", "float4e2m1-b128", "lloyd3-b64", "lloyd5-b64", "int4-b64-asym", "nf4-b32", "nf7-b64"]
    held = trials = 0
    for seed in range(3):
        truth = measure(formats=[*FORMATS, *new], noise=0.3, seed=seed)
        laws = fit_laws([point for point in truth if point.format not in new], draws=200)
        for point in truth:
            if point.format in new:
                found = predict(laws, Query(point.format, model=point.model))
                assert found.basis != MEASURED
                assert not found.extrapolated
                assert found.kl == pytest.approx(point.kl, rel=0.3)
                own = next(other for other in truth if other.is_original and other.model == point.model)
                held += found.delta_low <= point.nll - own.nll <= found.delta_high
                held += found.kl_low <= point.kl <= found.kl_high
                trials += 2
    assert held / trials > 0.88


def test_a_format_of_other_models_is_predicted_with_its_own_factor() -> None:
    def law(size: Size, format: str) -> float:
        return size.constant + math.log(gaussian_rounding(format).noise) + (0.7 if "nf" in format else 0.0)

    points = measure(log_kl=law, noise=0.05)
    left_out = [point for point in points if (point.model, point.format) == ("middle", "nf4-b64")]
    laws = fit_laws([point for point in points if point not in left_out], draws=100)
    found = predict(laws, Query("nf4-b64", model="middle"))
    assert found.basis == "format"
    assert found.kl == pytest.approx(left_out[0].kl, rel=0.1)


def test_a_model_that_was_not_measured(laws: Laws) -> None:
    known = predict(laws, Query("nf4-b64", linear_parameters=3_000_000, original_nll=3.8))
    assert not known.extrapolated
    assert known.kl == pytest.approx(math.exp(0.1) * gaussian_rounding("nf4-b64").error, rel=0.1)
    # Three models differ by 0.3 in ln KL; a fourth lies within a t interval of two degrees of freedom of their mean.
    assert known.kl_high / known.kl == pytest.approx(math.exp(4.303 * 0.3 * math.sqrt(4 / 3)), rel=0.5)
    unknown = predict(laws, Query("nf4-b64", linear_parameters=3_000_000))
    assert unknown.nll_high - unknown.nll_low > known.nll_high - known.nll_low
    assert 3.5 < unknown.nll < 4.2
    beyond = predict(laws, Query("nf4-b64", linear_parameters=10**9, original_nll=3.0, training_tokens=10**12))
    assert len(beyond.extrapolated) == 2
    assert "1000000000 parameters" in beyond.extrapolated[0]
    assert predict(laws, Query(ORIGINAL, linear_parameters=2_000_000)).basis == "power"
    trained = predict(laws, Query(ORIGINAL, linear_parameters=2_000_000, training_tokens=20_000_000))
    assert trained.basis == "published"
    assert 3.8 < trained.nll < 4.2
    assert trained.nll_low < trained.nll < trained.nll_high


def test_a_model_whose_gradients_were_taken() -> None:
    laws = fit_laws(measure(noise=0.02, gradients=True), draws=100)
    error = gaussian_rounding("nf4-b32").error
    query = Query("nf4-b32", linear_parameters=10**9, original_nll=3.0, weight_error=error, expected_kl=5 * error)
    found = predict(laws, query)
    assert found.basis == "sensitivity"
    # Far from the measured models, and with a divergence for its error that none of them has.
    assert found.kl == pytest.approx(5 * gaussian_rounding("nf4-b32").noise, rel=0.05)
    with pytest.raises(UsageError, match="expected divergence"):
        predict(laws, Query("nf4-b32", model="small", expected_kl=0.0))


def test_what_lies_beyond_the_laws_is_marked(laws: Laws) -> None:
    coarse = predict(laws, Query("int2-b64", model="small"))
    assert any("more coarsely" in text for text in coarse.extrapolated)
    assert any("2 bits: measured were 3 to 8" in text for text in coarse.extrapolated)
    # No coarse format was measured, so how far they lie from the law is not known.
    assert math.isinf(coarse.nll_high)
    assert any("shifts the mean" in text for text in predict(laws, Query("nf2-b64", model="small")).extrapolated)
    assert any("length of the rows" in text for text in predict(laws, Query("int4-row", model="small")).extrapolated)
    assert not predict(laws, Query("int4-row", model="small", weight_error=0.015)).extrapolated
    hard = predict(laws, Query("nf4-b32", model="small", weight_error=0.4))
    assert any("more coarsely" in text for text in hard.extrapolated)
    assert hard.kl > 0.3


def test_one_model_says_nothing_of_others() -> None:
    laws = fit_laws(measure(FAMILY[:1]), draws=50)
    found = predict(laws, Query("nf4-b64", linear_parameters=1_000_000, original_nll=4.0))
    assert math.isinf(found.nll_high)
    assert any("one model" in text for text in found.extrapolated)
    with pytest.raises(KbitError, match="two measured models"):
        predict(laws, Query("nf4-b64", linear_parameters=1_000_000))


def test_predictions_of_one_suite_share_the_text(laws: Laws) -> None:
    first, second = predict(laws, Query("nf4-b32", model="small")), predict(laws, Query("nf4-b32", model="large"))
    low, high = interval(first.nll_draws - second.nll_draws)
    assert high - low < 0.5 * (first.nll_high - first.nll_low)


@pytest.mark.parametrize(
    ("query", "error", "words"),
    [
        (Query("nf4-b64", model="nobody"), KbitError, "'nobody' is not among"),
        (Query("nf4-b64", tokenizer="z", linear_parameters=5), KbitError, "no model with this tokenizer"),
        (Query("nf4-b64"), KbitError, "number of parameters"),
        (Query("nf9-b64", model="small"), UsageError, "9 bits"),
        (Query("nf4-b32", model="small", method="gptq"), KbitError, "'gptq'.*rtn"),
        (Query("nf4-b32", model="small", weight_error=-1.0), UsageError, "weight error"),
        (Query("nf4-b32", model="small", weight_error=math.nan), UsageError, "weight error"),
        (Query("nf4-b64", linear_parameters=0), UsageError, "0 parameters"),
        (Query("nf4-b64", linear_parameters=5, original_nll=math.inf), UsageError, "loss inf"),
        (Query("nf4-b64", linear_parameters=5, training_tokens=-1), UsageError, "-1 training tokens"),
    ],
)
def test_bad_questions(laws: Laws, query: Query, error: type[KbitError], words: str) -> None:
    with pytest.raises(error, match=words):
        predict(laws, query)


def test_nothing_measured() -> None:
    with pytest.raises(KbitError, match="no measured points"):
        predict(fit_laws([]), Query("nf4-b64", linear_parameters=10))
    bare = fit_laws(measure(originals=False), draws=10)
    with pytest.raises(KbitError, match="its loss as it is was not measured"):
        predict(bare, Query("nf4-b32", model="small"))
    with pytest.raises(KbitError, match="no law for the method"):
        predict(bare, Query("nf4-b32", linear_parameters=5, original_nll=4.0))
    found = predict(bare, Query("nf4-b64", model="small"))
    assert found.basis == MEASURED
    assert math.isnan(found.delta)
    assert math.isfinite(found.nll_high)


# Real models on real text

REAL = [f"{dtype}{bits}-b64" for bits in (3, 4, 6) for dtype in ("nf", "int")]
NEW = ["lloyd3-b128", "float4e2m1-b64", "int4-b64-asym"]


@pytest.fixture(scope="module")
def real_points(data_dir: Path) -> list[Point]:
    return [
        point
        for name in ("novels-0.7m", "novels-2m")
        for point in measure_model(data_dir / "models" / name, data_dir / "novels/heldout/Doyle_Hound_1902.txt")
    ]


def measure_model(folder: Path, text_file: Path, tokens: int = 3072) -> list[Point]:
    """Rows of a model by the plainest means, without the sweep: quantize, evaluate, compare."""
    from kbit.backends.select import select_backend
    from kbit.checkpoint.resolve import open_model
    from kbit.evaluate.compare import compare
    from kbit.evaluate.logits import StoredLogits
    from kbit.evaluate.statistics import cluster
    from kbit.formats.quant_format import QuantFormat
    from kbit.models.load import load_decoder
    from kbit.quantizers.plan import make_plan
    from kbit.quantizers.rtn import QuantizedView
    from kbit.text.datasets import resolve_data
    from kbit.text.tokenizer import Tokenizer
    from kbit.text.windows import make_windows

    backend = select_backend("cpu", backend="native", compute="fp32", threads=1)
    text = resolve_data(str(text_file))
    rows = []
    with open_model(str(folder)) as source:
        windows = make_windows(text, Tokenizer.from_source(source), "gptq", 256, tokens)
        weights = {name: source.read(name) for name in source.tensors}
        with StoredLogits(load_decoder(source, backend), windows) as reference:
            for name in (ORIGINAL, *REAL, *NEW):
                format = QuantFormat.parse("int8-b64" if name == ORIGINAL else name)
                plan = make_plan(source, format)
                linear = [tensor for tensor in plan.tensors if tensor.role == "linear"]
                count = sum(tensor.source.numel for tensor in linear)
                view = source if name == ORIGINAL else QuantizedView(source, plan, weights.__getitem__)
                error = square = 0.0
                for tensor in linear:
                    weight = weights[tensor.source.name].float()
                    error += float((view.read(tensor.source.name).float() - weight).square().sum())
                    square += float(weight.square().sum())
                result = compare(load_decoder(view, backend), reference, windows)
                nll, kl = cluster(result.model.nll), cluster(result.kl)
                seen = None if name == ORIGINAL else target(name, "rtn")
                rows.append(
                    Point(
                        key=f"{folder.name} {name}",
                        model=folder.name,
                        model_id=source.fingerprint(),
                        tokenizer="novels",
                        method=ORIGINAL if seen is None else "rtn",
                        format=name,
                        dtype=ORIGINAL if seen is None else seen.dtype,
                        bits=16 if seen is None else seen.bits,
                        block_size=0 if seen is None else format.block_size,
                        linear_parameters=count,
                        parameters=sum(tensor.source.numel for tensor in plan.tensors),
                        linear_bits=16 * count if seen is None else 8 * sum(tensor.nbytes for tensor in linear),
                        total_bits=8 * sum(t.source.nbytes if seen is None else t.nbytes for t in plan.tensors),
                        training_tokens=None,
                        data=text_file.name,
                        data_sha256=text.sha256,
                        convention="gptq",
                        context=256,
                        tokens=result.model.tokens,
                        text_bytes=3 * result.model.tokens,
                        backend=backend.describe(),
                        nll=result.model.mean_nll,
                        kl=0.0 if seen is None else result.kl_mean,
                        top1=result.top1_agreement,
                        weight_error=error / square,
                        cluster_tokens=tuple(nll.sizes.tolist()),
                        cluster_nll=tuple(nll.sums.tolist()),
                        cluster_kl=tuple((0 * kl.sums if seen is None else kl.sums).tolist()),
                        quantize_seconds=0.0,
                        evaluate_seconds=0.0,
                        created="2026-01-01T00:00:00+00:00",
                    )
                )
    return rows


def test_real_formats_left_out_are_predicted(real_points: list[Point]) -> None:
    laws = fit_laws([point for point in real_points if point.format not in NEW], draws=300)
    own = {point.model: point.nll for point in real_points if point.is_original}
    held = []
    for point in real_points:
        if point.format not in NEW:
            continue
        found = predict(laws, Query(point.format, model=point.model, weight_error=point.weight_error))
        assert abs(found.nll / point.nll - 1) < 0.02
        assert found.kl == pytest.approx(point.kl, rel=0.25)
        held.append(found.delta_low <= point.nll - own[point.model] <= found.delta_high)
    assert np.mean(held) >= 0.75


def test_real_divergence_is_proportional_to_the_error_of_the_weights(real_points: list[Point]) -> None:
    laws = fit_laws(real_points, draws=300)
    fit = next(fit for fit in laws.suites[0].fits if fit.name == "error")
    s = next(parameter for parameter in fit.parameters if parameter.name == "s")
    assert s.value == pytest.approx(1, abs=0.1)
    assert fit.r_squared > 0.99
    left_out = next(held for held in laws.suites[0].heldout if (held.form, held.left_out) == ("error", "a format"))
    nothing = next(held for held in laws.suites[0].heldout if held.form == "nothing")
    assert left_out.near_worst is not None
    assert nothing.near_worst is not None
    assert left_out.near_worst < 0.02
    assert left_out.near_worst < nothing.near_worst
    for point in real_points:
        if not point.is_original:
            assert point.weight_error == pytest.approx(gaussian_rounding(point.format).error, rel=0.05)
