"""`--data sampled`: text from the original, kept in the cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conversion_cases import quantize
from scale_cases import request as sweep_request

import kbit.evaluate.sampled_data as sampled_data
from kbit.checkpoint.resolve import open_model
from kbit.evaluate.evaluation import Request, evaluate_model
from kbit.evaluate.sampled_data import evaluation_text
from kbit.host.errors import UsageError
from kbit.models.sampled_text import CALIBRATION_SEED, EVALUATION_SEED, sample_sequences
from kbit.text.tokenizer import Tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KBIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sampled"


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(first, count) of everything that is sampled in a test."""
    calls: list[tuple[int, int]] = []

    def spy(*arguments: Any, **options: Any) -> Any:
        calls.append((options["first"], options["count"]))
        return sample_sequences(*arguments, **options)

    monkeypatch.setattr(sampled_data, "sample_sequences", spy)
    return calls


def test_it_is_kept_and_goes_on_where_it_ended(
    tiny_model: Path, cache: Path, sampled: list[tuple[int, int]], tmp_path: Path
) -> None:
    model = str(tiny_model)
    short = evaluation_text("sampled", model, 200)
    assert evaluation_text("sampled", model, 200) == short
    long = evaluation_text("sampled", model, 600)
    assert sampled == [(0, 5), (5, 7)]
    assert long.text.startswith(short.text)
    with open_model(model) as source:
        tokenizer = Tokenizer.from_source(source)
    assert len(tokenizer.encode(long.text)) >= 600
    assert len(list(cache.iterdir())) == 1
    # A damaged file is no reason to fail, nor to believe it.
    next(cache.iterdir()).write_bytes(b"no array")
    assert evaluation_text("sampled", model, 600) == long
    # A file of that name wins, as with all names.
    (tmp_path / "sampled").write_text("a file's text")
    with pytest.MonkeyPatch().context() as here:
        here.chdir(tmp_path)
        assert evaluation_text("sampled", model).text == "a file's text"


def test_calibration_never_sees_it() -> None:
    assert CALIBRATION_SEED != EVALUATION_SEED


def test_an_evaluation_samples_from_the_reference(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize(tiny_model, out, "nf4-b32")
    found = evaluate_model(Request(str(out), "sampled", str(tiny_model), max_tokens=192, context=64))
    assert found.comparison is not None
    assert found.windows.count == 3
    assert found.data.note == f"written by {tiny_model}, seed {EVALUATION_SEED}"
    assert 0 < found.comparison.kl_mean < 1
    exact = evaluate_model(
        Request(str(tiny_model), "sampled", str(tiny_model), max_tokens=192, context=64, backend="reference")
    )
    assert exact.comparison is not None
    assert exact.comparison.kl_mean == pytest.approx(0, abs=1e-9)
    with pytest.raises(UsageError, match="--reference"):
        Request(str(out), "sampled").check()


def test_a_sweep_samples_from_its_first_model(tiny_model: Path, tmp_path: Path) -> None:
    from kbit.scaling.sweep.plan import plan_sweep

    asked = sweep_request(tiny_model, tmp_path / "sweep", Path("sampled"), max_tokens=128, context=64)
    plan = plan_sweep(asked)
    assert plan.text == evaluation_text("sampled", str(tiny_model), 128)
    assert plan.subjects[0].windows.ids.shape == (2, 64)
    assert plan.subjects[0].windows.ids.dtype == np.int64
