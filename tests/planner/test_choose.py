"""What fits, is quick enough, and is best."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from laws_cases import Size, measure
from planner_cases import FAMILY, FORMATS, MODELS, POINTS, choose, config, model

from kbit.formats.quant_format import QuantFormat
from kbit.host.errors import UsageError
from kbit.models.families import spec_from_config
from kbit.planner.models import PlanModel
from kbit.planner.quality import Quality, compare
from kbit.planner.shapes import KNOWN_GPUS, KNOWN_MODELS
from kbit.planner.weights import parameters, planned_weights
from kbit.scaling.laws.fit import fit_laws
from kbit.scaling.points import ORIGINAL


@pytest.mark.parametrize("name", KNOWN_MODELS)
def test_known_shapes_have_the_published_number_of_weights(name: str) -> None:
    known = KNOWN_MODELS[name]
    spec = spec_from_config(dict(known.config))
    assert parameters(planned_weights(spec, "fp16")) == known.parameters


def test_the_best_that_fits() -> None:
    """With room for everything the large model wins; with less it is quantized; with little the small one is left."""
    plenty = choose()
    assert plenty.best is not None
    assert plenty.best.model.name == "large"
    assert not plenty.by_rule
    assert len({candidate.model.name for candidate in plenty.candidates}) == 2
    losses = [candidate.known_quality.nll for candidate in plenty.candidates if candidate.known_quality is not None]
    assert losses == sorted(losses)
    assert len(losses) == len(plenty.candidates)
    sizes = sorted(plenty.total(candidate) for candidate in plenty.candidates)
    for size in sizes[::4]:
        some = choose(size)
        assert all(some.total(candidate) <= size for candidate in some.candidates)
        assert some.best is not None
        assert some.best.known_quality is not None
        assert some.best.known_quality.nll >= losses[0]
    least = choose(sizes[0], kv=("fp16",))
    assert {candidate.model.name for candidate in least.candidates} == {"small"}
    assert [name for name, _ in least.rejected] == ["large"]
    assert "at least" in least.rejected[0][1]
    nothing = choose(1000)
    assert nothing.best is None
    assert len(nothing.rejected) == 2


def test_measured_points_are_taken_as_they_are() -> None:
    by_format = {(c.model.name, c.label): c for c in choose().candidates}
    point = next(point for point in POINTS if (point.model, point.format) == ("large", "nf4-b64"))
    found = by_format["large", "nf4-b64"].known_quality
    assert found is not None
    assert found.basis == "measured"
    assert found.nll == pytest.approx(point.nll)
    assert found.low < point.nll < found.high
    by_law = by_format["large", "lloyd5-b64"].known_quality
    assert by_law is not None
    assert by_law.basis != "measured"
    assert by_law.nll < found.nll


def test_ties_are_marked() -> None:
    """int8 and the model as it is differ by less than the text can tell; the small model by far more."""
    standings = {(c.model.name, c.label): c.standing for c in choose().candidates}
    assert standings["large", "original"].tied
    assert standings["large", "int8-b64"].tied
    assert not standings["large", "nf3-b64"].tied
    assert not standings["small", "original"].tied
    assert sum(place.probability or 0 for place in standings.values()) == pytest.approx(1)
    assert standings["small", "original"].probability == 0


def test_a_narrow_cache_where_a_wide_one_does_not_fit() -> None:
    sizes = {kv: choose(kv=(kv,), models=[MODELS[1]], context=2048) for kv in ("fp16", "4")}
    full, narrow = (min(result.total(c) for c in result.candidates) for result in sizes.values())
    between = choose((full + narrow) // 2, context=2048, models=[MODELS[1]], kv=("fp16", "4"))
    assert between.candidates
    assert {candidate.kv for candidate in between.candidates} == {"4"}
    assert any("cache of 4 bits" in note for note in between.notes)
    # Of one model, what leaves room for whole keys and values comes first.
    mixed = choose(full + 1000, context=2048, models=[MODELS[1]], kv=("fp16", "4"))
    kinds = [candidate.kv for candidate in mixed.candidates]
    assert set(kinds) == {"fp16", "4"}
    assert kinds == sorted(kinds, reverse=True)
    # What a narrow cache costs is not in its loss, so it takes no part in who is best.
    chances: dict[str, list[Any]] = {candidate.kv: [] for candidate in mixed.candidates}
    for candidate in mixed.candidates:
        chances[candidate.kv].append(candidate.standing.probability)
        assert candidate.standing.compares
    assert set(chances["4"]) == {None}
    assert sum(chances["fp16"]) == pytest.approx(1)


def test_what_was_only_measured_is_not_offered() -> None:
    """16-bit outliers have no kernel; nor can a method run that this kbit does not know."""
    extra = [
        replace(point, method=method, key=f"{method} {point.key}")
        for point in POINTS
        for method in ("outliers", "unheard-of")
        if point.format == "nf4-b64"
    ]
    found = choose(points=[*POINTS, *extra], laws=fit_laws([*POINTS, *extra], draws=50)).candidates
    assert {candidate.method for candidate in found} <= {"rtn", ORIGINAL}


def test_a_minimum_speed() -> None:
    wide = ("fp16",)
    speeds = {(c.model.name, c.label): c.speed.decode for c in choose(kv=wide).candidates if c.speed is not None}
    wanted = speeds["large", "nf4-b64"]
    quick = choose(min_speed=wanted, kv=wide)
    assert ("large", "original") not in {(c.model.name, c.label) for c in quick.candidates}
    assert all(c.speed is not None and c.speed.decode >= wanted for c in quick.candidates)
    assert quick.best is not None
    assert quick.best.label == "nf4-b64"
    hopeless = choose(min_speed=1e8)
    assert not hopeless.candidates
    assert all("too slow" in why for _, why in hopeless.rejected)
    # At the end of a long context a narrower cache is quicker.
    slow = choose(context=2048, models=[MODELS[1]], formats=(QuantFormat.parse("nf4-b64"),))
    assert slow.best is not None
    assert slow.best.speed is not None
    quicker = choose(
        context=2048,
        models=[MODELS[1]],
        formats=(QuantFormat.parse("nf4-b64"),),
        min_speed=slow.best.speed.decode * 1.05,
    )
    assert quicker.best is not None
    assert quicker.best.kv == "8"
    with pytest.raises(UsageError, match="--no-speed"):
        choose(min_speed=1.0, rates=None)


def test_without_measured_points_a_rule_orders_and_says_so() -> None:
    result = choose(laws=None, points=())
    assert result.by_rule
    assert result.best is not None
    assert all(candidate.standing.probability is None for candidate in result.candidates)
    names = [candidate.model.name for candidate in result.candidates]
    bits = [16 if c.format is None else c.format.bits for c in result.candidates]
    four = [name for name, width in zip(names, bits, strict=True) if width >= 4]
    assert four == sorted(four)
    assert names[: len(four)] == four
    assert any("no losses were measured" in note for note in result.notes)
    assert result.to_dict()["ordered_by"] == "rule"


def test_a_model_nobody_measured() -> None:
    """With the tokenizer of the points a law reaches it; without one nothing is said about its loss."""
    shape = config(192, 6)
    spec = spec_from_config(shape)
    weights = planned_weights(spec, "fp16")
    points = measure((*FAMILY, Size("third", 1_000_000, None, 3.9, 0.2)), FORMATS)
    laws = fit_laws(points, draws=100)
    related = PlanModel("related", spec, weights, "fp16", tokenizer=points[0].tokenizer)
    stranger = PlanModel("stranger", spec, weights, "fp16", tokenizer="0" * 64)
    shapeless = PlanModel("shapeless", spec, weights, "fp16")
    result = choose(models=[related, stranger, shapeless], points=points, laws=laws)
    known = {c.model.name for c in result.candidates if c.known_quality is not None}
    assert known == {"related"}
    assert result.best is not None
    assert result.best.model.name == "related"
    reasons = {c.model.name: c.quality for c in result.candidates if isinstance(c.quality, str)}
    assert set(reasons) == {"stranger", "shapeless"}
    assert all(reasons.values())


def test_what_a_model_cannot_hold() -> None:
    result = choose(context=4096)
    assert not result.candidates
    assert all(why == "its context is 2048 tokens" for _, why in result.rejected)
    fixed = choose(models=[model("large", fixed=True, measured=None)])
    assert [candidate.label for candidate in fixed.candidates] == ["original"]


def test_a_gpu_is_a_guess() -> None:
    gpu = KNOWN_GPUS["rtx-3060"]
    result = choose(gpu.memory, gpu=gpu, rates=None, constant=None, models=[MODELS[1]])
    assert result.best is not None
    assert result.best.speed is not None
    speed = result.best.speed
    assert speed.high < gpu.bandwidth / speed.bytes_per_token
    assert "not timed" in speed.basis
    assert speed.prefill is None
    assert any("assumptions" in note for note in result.notes)


def quality(draws: list[float], text: str = "a", suite: str = "s") -> Quality:
    return Quality(1, 1, 1, 0, 0, 0, draws[0], "measured", (), suite, text, np.array(draws))


def test_standings() -> None:
    best = quality([1.0, 1.0, 1.1, 0.9, 1.0])
    same = quality([1.0005, 1.001, 1.1, 0.901, 0.999])
    worse = quality([2.0, 2.0, 2.1, 1.9, 2.0])
    other = quality([0.1, 0.1, 0.1, 0.1, 0.1], text="b")
    found = compare([worse, best, None, same, other])
    assert [place.tied for place in found] == [False, True, False, True, False]
    assert [place.probability for place in found] == [0, 0.75, None, 0.25, None]
    assert compare([]) == []
    assert compare([None])[0].probability is None
    # One text, two tokenizers: per byte they compare, but nothing is paired.
    assert compare([best, quality([1.3, 1.3, 1.4, 1.2, 1.3], suite="t")])[0].probability == 1
