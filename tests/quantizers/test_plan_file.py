"""Plans as files: what is saved is what is made, what is edited is obeyed, and mistakes are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conversion_cases import files_of
from error_cases import UP, run_command

from kbit.checkpoint.resolve import open_model

EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, write_model: Any) -> Path:
    folder: Path = write_model(tmp_path_factory.mktemp("planned") / "model")
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """The plan of a mixed model."""
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    before = run_command([*words(model), "--dry-run", "--json"])[1]
    assert "predicted_kl" not in json.loads(before)
    assert run_command([*words(model), "--save-plan", str(path)])[0] == 0
    return path


def words(model: Path) -> list[str]:
    return [
        "quantize",
        str(model),
        "--bits",
        "3.5",
        "--block-size",
        "32",
        "--calibration-tokens",
        "256",
        "--no-measure",
    ]


def edited(saved: Path, out: Path, **lines: Any) -> Path:
    """The plan with some entries changed, or removed (None)."""
    plan = json.loads(saved.read_text())
    for name, line in lines.items():
        where = plan if name in plan else plan["tensors"]
        where[name] = line
        if line is None:
            del where[name]
    out.write_text(json.dumps(plan))
    return out


def test_a_saved_plan_makes_what_would_have_been_made(tmp_path: Path, model: Path, saved: Path) -> None:
    code, _, said = run_command([*words(model), "-o", str(tmp_path / "at-once")])
    assert code == 0
    assert "plan: " in said
    assert "  linear    " in said
    assert (
        run_command(["quantize", str(model), "--plan", str(saved), "--no-measure", "-o", str(tmp_path / "out")])[0] == 0
    )
    assert files_of(tmp_path / "at-once") == files_of(tmp_path / "out")
    plan = json.loads(saved.read_text())
    costs = [line["predicted_kl"] for line in plan["tensors"].values()]
    assert sum(costs) == pytest.approx(plan["predicted_kl"], rel=1e-3)
    # What is in the cache, a dry run shows.
    shown = json.loads(run_command([*words(model), "--dry-run", "--json"])[1])
    assert shown["predicted_kl"] == pytest.approx(plan["predicted_kl"], rel=1e-3)
    assert {n: row["to"] for n, row in shown["tensors"].items() if len(row["shape"]) == 2} == {
        name: line["to"] for name, line in plan["tensors"].items()
    }


def test_edits_are_obeyed(tmp_path: Path, model: Path, saved: Path) -> None:
    plan = edited(saved, tmp_path / "plan.json", **{UP: "int8-b32", EMBEDDING: {"to": "f32"}, "fingerprint": None})
    assert (
        run_command(["quantize", str(model), "--plan", str(plan), "--no-measure", "-o", str(tmp_path / "out")])[0] == 0
    )
    with open_model(str(tmp_path / "out")) as source:
        tensors = source.config["quantization_config"]["tensors"]
        assert tensors[UP]["format"] == "int8-b32"
        assert EMBEDDING not in tensors
        assert source.tensors[EMBEDDING].stored_as == "F32"
    # Edited, it can be weighed again.
    again = ["quantize", str(model), "--plan", str(plan), "--save-plan", str(tmp_path / "again.json")]
    assert run_command(again)[0] == 0
    weighed = json.loads((tmp_path / "again.json").read_text())["tensors"]
    before = json.loads(saved.read_text())["tensors"]
    assert weighed[UP]["to"] == "int8-b32"
    assert weighed[UP]["predicted_kl"] < before[UP]["predicted_kl"]
    assert "predicted_kl" not in weighed[EMBEDDING]


def test_any_method_has_a_plan(tmp_path: Path, model: Path) -> None:
    path = tmp_path / "plan.json"
    command = ["quantize", str(model), "--method", "rtn", "--bits", "4", "--save-plan", str(path)]
    assert run_command(command)[0] == 0
    plan = json.loads(path.read_text())
    assert (plan["method"], "calibration" in plan, plan["tensors"][UP]["to"]) == ({"name": "rtn"}, False, "nf4-b64")
    assert not (tmp_path / "out").exists()
    assert run_command(["quantize", str(model), "--plan", str(path), "-o", str(tmp_path / "out")])[0] == 0
    assert b'"rtn"' in (tmp_path / "out" / "kbit-manifest.json").read_bytes()


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ({UP: "nf9-b64"}, f"{UP}: "),
        ({UP: {"bytes": 3}}, f'{UP}: needs a format such as "nf4-b64", or "keep"'),
        ({UP: None}, f"has no line for {UP}"),
        ({"model.layers.7.nothing.weight": "nf4-b64"}, "model.layers.7.nothing.weight: "),
        ({"model.norm.weight": "nf4-b64"}, "model.norm.weight has shape"),
        ({"fingerprint": "0" * 64}, "was made for another model"),
        ({"kbit_plan": 2}, "is a plan of version 2"),
        ({"method": "ldlq2"}, '"method" names no method'),
        ({"method": {"name": "magic"}}, "method 'magic' is unknown"),
        ({"method": {"name": "ldlq2", "anchor": "4"}}, '"anchor" 4 of "method" is no width'),
        ({"method": {"name": "ldlq2", "anchor": 4}}, "--anchor 4: is a width of a nested file; add --nested 2..8"),
        ({"calibration": "sampled"}, '"calibration" is not understood'),
        ({"format": None}, '"format"'),
    ],
)
def test_mistakes_are_named(tmp_path: Path, model: Path, saved: Path, lines: dict[str, Any], said: str) -> None:
    plan = edited(saved, tmp_path / "plan.json", **lines)
    code, _, error = run_command(["quantize", str(model), "--plan", str(plan), "-o", str(tmp_path / "out")])
    assert (code, said in error) == (2, True), error
    assert not (tmp_path / "out").exists()


def test_a_plan_says_everything(tmp_path: Path, model: Path, saved: Path) -> None:
    for flags in (["--bits", "4"], ["--override", "*=keep"], ["--size", "1MB"], ["--embedding-bits", "8"]):
        code, _, error = run_command(["quantize", str(model), "--plan", str(saved), *flags])
        assert (code, "says every format" in error) == (2, True)
    code, _, error = run_command(["quantize", str(model), "--plan", str(tmp_path / "none.json")])
    assert (code, "no such file" in error) == (1, True)
