"""Which models there are to choose among."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from laws_cases import Size, measure
from planner_cases import SHAPES

from kbit.host.errors import CheckpointError, UnsupportedError, UsageError
from kbit.planner.models import find_models
from kbit.planner.shapes import KNOWN_MODELS


def test_models_that_are_named(tmp_path: Path, tiny_model: Path, novels_folder: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["large"]))
    points = measure((Size("novels-2m", 1_966_080, None, 3.5, 0.0),), ("nf4-b64",))
    found, notes = find_models([str(tmp_path / "config.json"), str(tiny_model), novels_folder, "Llama-3.1-8B"], points)
    by_name = {Path(model.name).name: model for model in found}
    assert not notes
    assert [model.total_parameters for model in found] == sorted(m.total_parameters for m in found)
    assert by_name["novels-2m"].measured == "novels-2m"
    assert by_name["novels-2m"].training_tokens == 14_303_232
    assert by_name["novels-2m"].linear_parameters == 1_966_080
    assert by_name["novels-2m"].tokenizer is not None
    assert by_name[tmp_path.name].tokenizer is None
    assert by_name[tmp_path.name].dtype == "fp16"
    assert by_name["llama-3.1-8b"].known
    assert by_name[tiny_model.name].measured is None


def test_a_gguf_file(smollm2_gguf: Path) -> None:
    (found,), _ = find_models([str(smollm2_gguf)])
    assert found.gguf
    assert not found.fixed
    assert found.total_parameters == 134_515_008
    kinds = {str(weight.kept) for weight in found.weights if weight.role == "linear"}
    assert kinds == {"int4-b32-asym"}


def test_names_that_are_nothing(tmp_path: Path, no_network: None) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "mamba"}')
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "empty").mkdir()
    for name, kind, match in (
        ("nowhere", UsageError, "no such folder"),
        ("org/unknown", UsageError, "not in the hub's cache"),
        ("", UsageError, "empty"),
        ("smollm2-135m-instruct", UsageError, "kbit pull"),
        (str(tmp_path / "other"), UnsupportedError, "mamba"),
        (str(tmp_path / "broken.json"), CheckpointError, "not valid JSON"),
        (str(tmp_path / "empty"), CheckpointError, "no such file"),
    ):
        with pytest.raises(kind, match=match):
            find_models([name])


def test_what_is_at_hand(no_network: None) -> None:
    found, notes = find_models([])
    assert [model.name for model in found] == sorted(KNOWN_MODELS, key=lambda name: KNOWN_MODELS[name].parameters)
    assert not notes
