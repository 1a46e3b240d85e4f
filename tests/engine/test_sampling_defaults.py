"""How tokens are chosen where nobody says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from kbit.engine.sampler import SamplingParams
from kbit.engine.sampling_defaults import USUAL, sampling_defaults
from kbit.host.notes import KbitNote
from kbit.models.opening import open_model


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, SamplingParams(temperature=0.6, top_k=50, top_p=0.9)),
        ({"temperature": 0.5, "top_k": 20, "min_p": 0.1}, SamplingParams(temperature=0.5, top_k=20, min_p=0.1)),
        ({"do_sample": False, "temperature": 0.5}, SamplingParams()),
        ({"do_sample": True, "temperature": -3}, USUAL),
        ({"do_sample": True, "temperature": "warm"}, USUAL),
        ({"eos_token_id": 2}, USUAL),
        (None, USUAL),
    ],
)
def test_a_models_own_settings_come_first(
    tiny_model: Path, tmp_path: Path, config: dict[str, Any] | None, expected: SamplingParams
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    if config is not None:
        (folder / "generation_config.json").write_text(json.dumps(config))
    with open_model(str(folder)) as source:
        found = sampling_defaults(source, "model")
    assert found.params == expected
    assert ("generation_config.json" in str(found)) == (expected is not USUAL)


def test_listed_models_have_their_authors(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "SmolLM2-tiny")
    with open_model(str(folder)) as source:
        found = sampling_defaults(source, str(folder))
    assert (found.params.temperature, found.params.top_p) == (0.2, 0.9)
    assert str(found) == "temperature 0.2, top-p 0.9 (recommended by the model's authors)"


@pytest.mark.parametrize("config", [{"temperature": -1.0, "top_p": 0.9}, {"top_p": "much"}])
def test_senseless_settings_are_left_out_and_said(tiny_model: Path, tmp_path: Path, config: dict[str, Any]) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps(config))
    with (
        open_model(str(folder)) as source,
        pytest.warns(KbitNote, match="generation_config.json says how to sample, but"),
    ):
        found = sampling_defaults(source, "model")
    assert found.params == USUAL
