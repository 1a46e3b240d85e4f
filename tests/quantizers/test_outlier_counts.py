"""Which matrices keep weights apart: where the method may choose, as many as pay, told by the weights alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from error_cases import edit_tensors, run_command

from kbit.formats.registry import parse_format
from kbit.models.opening import open_model
from kbit.quantizers.methods import get_method
from kbit.quantizers.outlier_counts import with_outliers
from kbit.quantizers.plan import Plan, make_plan

GIANT = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def model(tmp_path: Path, tiny_model: Path) -> Path:
    """A model one of whose matrices has three weights that are far beyond the others."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)

    def plant(tensors: dict[str, torch.Tensor]) -> None:
        for row, column in ((0, 3), (2, 9), (2, 30)):
            tensors[GIANT][row, column] = 90 * tensors[GIANT][row].float().square().mean().sqrt()

    edit_tensors(folder, plant)
    return folder


def apart(plan: Plan) -> dict[str, str]:
    return {tensor.source.name: tensor.label for tensor in plan.tensors if "-o" in tensor.label}


def test_only_where_the_method_may_choose(model: Path) -> None:
    with open_model(str(model)) as source:
        for method, format, planes, expected in (
            ("trellis", "trellis3", False, "trellis3-o4"),
            ("trellis-tuned", "trellis2.5", False, "trellis2.5-o4"),
            ("trellis-plain", "trellis3", False, None),
            ("ldlq2", "nf4-b16", True, "nf4-b16-o4"),
            ("gptq", "int4-b16", True, "int4-b16-o4"),
            ("ldlq2", "nf4-b16", False, None),
            ("rtn", "nf4-b16", True, None),
        ):
            plan = make_plan(source, parse_format(format), method=get_method(method))
            found = with_outliers(source, plan, get_method(method), planes=planes)
            assert apart(found) == ({} if expected is None else {GIANT: expected}), (method, format)
            assert (found.plan_id == plan.plan_id) == (expected is None)
        plan = make_plan(source, parse_format("trellis3-o16"), method=get_method("trellis"))
        assert set(apart(with_outliers(source, plan, get_method("trellis"))).values()) == {"trellis3-o16"}
        plan = make_plan(source, parse_format("trellis3"), method=get_method("trellis"))
        assert not apart(with_outliers(source, plan, get_method("trellis"), fixed=[GIANT]))


def test_weights_are_read_once(model: Path) -> None:
    with open_model(str(model)) as source:
        plan = make_plan(source, parse_format("trellis3"), method=get_method("trellis"))
        told: list[tuple[str, int, int]] = []
        for _ in range(2):
            with_outliers(source, plan, get_method("trellis"), progress=lambda *step: told.append(step))
    linear = sum(tensor.role == "linear" for tensor in plan.tensors)
    assert told == [("looking for outliers", step + 1, linear) for step in range(linear)]


@pytest.mark.parametrize(("method", "format"), [("hqq", "int4-b16-asym-o4"), ("awq", "int4-b16-o4")])
def test_methods_that_know_nothing_of_them_refuse(model: Path, method: str, format: str) -> None:
    code, _, error = run_command(["quantize", str(model), "--method", method, "--format", format])
    assert code != 0
    assert f"method {method}, format {format}: it keeps no weights apart (-o): use ldlq2, gptq or rtn" in error


def formats_of(folder: Path) -> Mapping[str, str]:
    tensors = json.loads((folder / "config.json").read_text())["quantization_config"]["tensors"]
    return {name: tensor["format"] for name, tensor in tensors.items()}


def test_the_command(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mixed widths and one width keep them apart; a format of planes that is named does not, and can be exported."""
    monkeypatch.setenv("KBIT_CALIBRATION", str(tmp_path / "calibration"))
    words = ["quantize", str(model), "--calibration-tokens", "256", "--no-measure"]
    for name, more, keeps in (
        ("mixed", ["--bits", "4"], True),
        ("uniform", ["--bits", "3", "--uniform"], True),
        ("named", ["--format", "int4-b32"], False),
        ("dtype", ["--bits", "4", "--dtype", "int", "--block-size", "32"], False),
        ("trellis", ["--format", "trellis3-l8"], True),
    ):
        code, said, err = run_command([*words, *more, "-o", str(tmp_path / name)])
        assert code == 0, said + err
        found = [name for name, format in formats_of(tmp_path / name).items() if "-o" in format]
        assert found == ([GIANT] if keeps else []), name
        assert ("4 large weights are kept apart" in err) == (name == "mixed"), err
        again = run_command([*words, *more, "-o", str(tmp_path / name)])
        assert "already complete" in again[1]
        code, said, err = run_command(["run", "a", "--model", str(tmp_path / name), "--max-tokens", "2"])
        assert code == 0, err
    plan = tmp_path / "plan.json"
    assert run_command([*words, "--bits", "4", "--save-plan", str(plan)])[0] == 0
    assert "-o4" in plan.read_text()
    assert run_command([*words, "--plan", str(plan), "-o", str(tmp_path / "planned")])[0] == 0
    assert formats_of(tmp_path / "planned") == formats_of(tmp_path / "mixed")
    assert (tmp_path / "planned" / "model.safetensors").read_bytes() == (
        tmp_path / "mixed" / "model.safetensors"
    ).read_bytes()
    folder = str(tmp_path / "integers")
    assert run_command(["quantize", str(model), "--method", "rtn", "--format", "int4-b32-o4", "-o", folder])[0] == 0
    for what in ("gguf", "compressed-tensors"):
        code, said, err = run_command(["export", folder, "--to", what, "-o", str(tmp_path / f"exported.{what}")])
        assert code != 0
        assert "keeps weights apart from its codes (int4-b32-o4)" in err
    embedding = ["--override", "model.embed_tokens.weight=nf4-b16-o4"]
    code, said, err = run_command([*words, "--bits", "4", *embedding, "-o", str(tmp_path / "no")])
    assert code != 0
    assert "rows of a matrix that keeps weights apart are not looked up one by one" in err
