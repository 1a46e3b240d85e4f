"""`kbit plan`: what it is asked, and what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from planner_cases import POINTS, SHAPES
from typer.testing import CliRunner

from kbit.cli.plan import parse_size, plan
from kbit.formats.nested import NestedFormat
from kbit.formats.registry import parse_format
from kbit.formats.trellis import TrellisFormat
from kbit.host.errors import KbitError, UnsupportedError, UsageError
from kbit.models.opening import open_model
from kbit.planner.models import find_models
from kbit.planner.shapes import KNOWN_MODELS
from kbit.quantizers.convert import convert
from kbit.quantizers.plan import make_plan
from kbit.scaling.points import append_points

app = typer.Typer()
app.command()(plan)


@pytest.mark.parametrize(
    ("text", "size"), [("6GiB", 6 << 30), ("6G", 6 * 10**9), ("800mb", 800 * 10**6), ("1.5 TiB", 3 << 39), ("123", 123)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size("--memory", text) == size


@pytest.mark.parametrize("text", ["", "6XB", "-1GB", "GiB", "0", "5iB", "1e9", "6 GiB extra"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="--memory"):
        parse_size("--memory", text)


@pytest.mark.parametrize(
    "arguments",
    [
        "--memory much", "--context 0", "--min-speed 0", "--min-speed nan", "--bits 1..4", "--bits x", "--bits 8..2",
        "--kv-bits 5", "--kv-bits ,", "--embedding-bits 1", "--compute int4", "--threads 0", "--device abacus",
        "--device 0GB/s", "--format nf9-b64", "--points nowhere", "--min-speed 5 --no-speed",
    ],
)  # fmt: skip
def test_flags_that_make_no_sense(arguments: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KBIT_CACHE", str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["small"]))
    result = CliRunner().invoke(app, [str(tmp_path / "config.json"), "--context", "64", *arguments.split()])
    assert isinstance(result.exception, UsageError), result.output
    flag = arguments.split()[0]
    assert flag in str(result.exception) or flag.strip("-").split("-")[0] in str(result.exception)


@pytest.fixture
def sweep(tmp_path: Path, write_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two models in folders, and points of them."""
    monkeypatch.setenv("KBIT_CACHE", str(tmp_path / "cache"))
    for name, shape in SHAPES.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(shape))
    append_points(tmp_path / "points.jsonl", POINTS)
    return tmp_path


def test_the_command(sweep: Path) -> None:
    names = [str(sweep / name) for name in SHAPES]
    command = [*names, "--points", str(sweep), "--memory", "1GB", "--context", "256", "--no-speed"]
    result = CliRunner().invoke(app, [*command, "--json"])
    assert result.exit_code == 0, result.exception
    answer = json.loads(result.stdout)
    assert answer["ordered_by"] == "loss"
    assert answer["choices"][0]["model"].endswith("large")
    first = answer["choices"][0]
    assert first["loss"]["basis"] == "measured"
    assert first["tokens_per_second"] is None
    assert first["memory"]["total"] == first["memory"]["peak"]
    assert first["tied_with_best"]
    people = CliRunner().invoke(app, command)
    assert people.exit_code == 0, people.exception
    assert "Least loss: " in people.stdout
    assert "tied" in people.stdout
    assert str(sweep) not in people.stdout.split("\n")[2]
    everything = CliRunner().invoke(app, [*command, "--all", "--bits", "3,4"])
    assert everything.exit_code == 0
    assert "lloyd5" not in everything.stdout


def test_trellises_are_planned_as_formats_and_as_folders(sweep: Path, tiny_model: Path) -> None:
    """As `kbit quantize` would make them, as it has made them, and as they were measured."""
    small = str(sweep / "small")
    measured = replace(next(p for p in POINTS if p.model == "small" and p.bits == 3), format="trellis3", dtype="trellis",
                       method="trellis", key="a trellis", block_size=0)  # fmt: skip
    append_points(sweep / "points.jsonl", [measured])
    command = ["--points", str(sweep), "--memory", "1GB", "--context", "32", "--no-speed", "--json"]
    formats = ["--format", "trellis3", "--format", "trellis2-sum4", "--format", "nf3-b64"]
    result = CliRunner().invoke(app, [small, *formats, *command])
    assert result.exit_code == 0, result.exception
    rows = {row["format"]: row for row in json.loads(result.stdout)["choices"]}
    assert rows.keys() == {"trellis3 trellis", "trellis2-sum4 trellis", "nf3-b64"}
    assert rows["trellis3 trellis"]["loss"]["basis"] == "measured"
    assert rows["trellis3 trellis"]["bits_per_weight_linear"] < rows["nf3-b64"]["bits_per_weight_linear"]
    everything = CliRunner().invoke(app, [small, *command])
    assert "trellis3 trellis" in [row["format"] for row in json.loads(everything.stdout)["choices"]]
    with open_model(str(tiny_model)) as source:
        plan = make_plan(source, TrellisFormat(3, window=10))
        convert(source, plan, sweep / "out")
    folder = CliRunner().invoke(app, [str(sweep / "out"), *command])
    assert folder.exit_code == 0, folder.exception
    answer = json.loads(folder.stdout)
    assert answer["choices"], answer["rejected"]
    row = answer["choices"][0]
    linear = sum(tensor.nbytes for tensor in plan.tensors if tensor.role == "linear")
    assert row["bits_per_weight_linear"] == 8 * linear / sum(t.source.numel for t in plan.tensors if t.role == "linear")
    refused = CliRunner().invoke(app, [small, "--format", "nested2..8-b64", *command])
    assert isinstance(refused.exception, UnsupportedError)
    assert "planes and trellis formats, not of nested2..8-b64" in str(refused.exception)


def test_a_file_of_several_widths_has_the_losses_that_were_measured_of_it(sweep: Path, tiny_model: Path) -> None:
    """`kbit scale --dtypes nested` of the model it was made from; not of a file that was made otherwise."""
    format = NestedFormat(2, 4, 32)
    with open_model(str(tiny_model)) as source:
        convert(source, make_plan(source, format), sweep / "all")
    (file,) = {model.file for model in find_models([str(sweep / "all")])[0]}
    assert file == str(sweep / "all")
    three = next(model for model in find_models([file])[0] if model.bits == 3)
    rows = [
        replace(point, model="of", model_id="of", tokenizer=three.tokenizer, linear_parameters=three.linear_parameters)
        for point in POINTS
        if point.model == "small"
    ]
    like = next(row for row in rows if row.bits == 3)
    rows += [
        replace(like, key=f"at {width}", format=f"{format}@{width}", dtype="nested", bits=width) for width in (2, 3)
    ]
    (sweep / "points.jsonl").unlink()
    append_points(sweep / "points.jsonl", rows)
    command = ["--points", str(sweep), "--memory", "1GB", "--context", "32", "--no-speed", "--json", file]

    def losses() -> dict[str, str | None]:
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.exception
        choices = json.loads(result.stdout)["choices"]
        return {row["model"].split()[-1]: row["loss"] and row["loss"]["basis"] for row in choices}

    assert losses() == {"2": "measured", "3": "measured", "4": None}
    manifest = sweep / "all" / "kbit-manifest.json"
    made = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**made, "method": {**made["method"], "settings": {"anchor": 7}}}))
    assert losses() == {"2": None, "3": None, "4": None}


def test_of_what_is_k_bit_already_the_rule_prefers_more_bits(sweep: Path, tiny_model: Path) -> None:
    """Where nothing was measured: the widest rung of a nested file, and the wider of two folders."""
    for text in ("nested2..6-b16", "nf3-b16", "nf5-b16"):
        with open_model(str(tiny_model)) as source:
            convert(source, make_plan(source, parse_format(text)), sweep / text)
    options = ["--points", str(sweep), "--memory", "1GB", "--context", "32", "--no-speed", "--json"]
    for models, best in (
        (["nested2..6-b16"], ["nested2..6-b16 --bits 6", "nested2..6-b16 --bits 5", "nested2..6-b16 --bits 4"]),
        (["nf3-b16", "nf5-b16"], ["nf5-b16", "nf3-b16"]),
    ):
        result = CliRunner().invoke(app, [*(str(sweep / model) for model in models), *options])
        assert result.exit_code == 0, result.exception
        order = dict.fromkeys(Path(row["model"]).name for row in json.loads(result.stdout)["choices"])
        assert list(order)[: len(best)] == best


def test_hostile_names_do_no_harm(sweep: Path) -> None:
    hostile = sweep / "evil\x1b[2J[bold]"
    hostile.mkdir()
    (hostile / "config.json").write_text(json.dumps(SHAPES["small"]))
    result = CliRunner().invoke(
        app, [str(hostile), "--points", str(sweep), "--memory", "1GB", "--context", "9", "--no-speed"]
    )
    assert result.exit_code == 0, result.exception
    assert "\x1b" not in result.stdout
    assert "[bold]" in result.stdout


def test_damaged_points_are_an_error(sweep: Path) -> None:
    with (sweep / "points.jsonl").open("a") as file:
        file.write('{"schema": 1}\n')
    result = CliRunner().invoke(app, [str(sweep / "small"), "--points", str(sweep), "--memory", "1GB", "--no-speed"])
    assert isinstance(result.exception, KbitError)
    assert "points.jsonl, line" in str(result.exception)


def test_the_list() -> None:
    result = CliRunner().invoke(app, ["--list", "--json"])
    answer = json.loads(result.stdout)
    assert {row["name"] for row in answer["models"]} == set(KNOWN_MODELS)
    assert "rtx-4090" in CliRunner().invoke(app, ["--list"]).stdout


def test_planning_for_memory_needs_no_torch(sweep: Path) -> None:
    arguments = [
        "plan",
        str(sweep / "large"),
        "llama-3.1-8b",
        "--memory",
        "6GiB",
        "--context",
        "512",
        "--no-speed",
        "--json",
    ]
    code = (
        "import sys, typer; from kbit.cli.plan import plan; app = typer.Typer(); app.command()(plan); "
        f"sys.argv = {arguments!r}\n"
        "try: app()\nexcept SystemExit as end: assert not end.code, end.code\n"
        "assert not {'torch', 'matplotlib', 'ray'} & set(sys.modules), sorted(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=sweep, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert {row["model"] for row in json.loads(done.stdout)["choices"]} == {str(sweep / "large"), "llama-3.1-8b"}
