"""`kbit plan`: what is found, fits, is quick enough, is best, and is said."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from laws_cases import Size, measure
from typer.testing import CliRunner

from kbit.cli.plan import parse_size, plan
from kbit.formats.nested import NestedFormat
from kbit.formats.quant_format import QuantFormat
from kbit.formats.trellis import TrellisFormat
from kbit.host.errors import CheckpointError, KbitError, UnsupportedError, UsageError
from kbit.models.families import spec_from_config
from kbit.models.opening import open_model
from kbit.planner.choose import make_recommendation
from kbit.planner.kernel_timing import AttentionRate, KernelRate, Overheads
from kbit.planner.machine import MachineSpeed, attention_key
from kbit.planner.models import PlanModel, find_models
from kbit.planner.quality import Quality, compare
from kbit.planner.shapes import KNOWN_GPUS, KNOWN_MODELS
from kbit.planner.types import Recommendation, Requirements
from kbit.planner.weights import parameters, planned_weights
from kbit.quantizers.convert import convert
from kbit.quantizers.plan import make_plan
from kbit.scaling.laws.fit import fit_laws
from kbit.scaling.points import ORIGINAL, append_points

app = typer.Typer()
app.command()(plan)

FORMATS = ("nf3-b64", "nf4-b64", "int4-b64", "int8-b64")


def config(width: int, layers: int) -> dict[str, Any]:
    """A small Llama: its linear layers have 16 width^2 weights each."""
    return {
        "model_type": "llama",
        "vocab_size": 2000,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 32,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
    }


SHAPES = {"small": config(128, 4), "large": config(256, 8)}
LINEAR = {name: 16 * shape["hidden_size"] ** 2 * shape["num_hidden_layers"] for name, shape in SHAPES.items()}
FAMILY = (Size("small", LINEAR["small"], None, 4.2, 0.4), Size("large", LINEAR["large"], None, 3.5, -0.2))
POINTS = measure(FAMILY, FORMATS)
LAWS = fit_laws(POINTS, draws=200)


def model(name: str, **facts: Any) -> PlanModel:
    spec = spec_from_config(SHAPES[name])
    weights = planned_weights(spec, "fp16")
    return PlanModel(name, spec, weights, "fp16", **{"measured": name, **facts})


MODELS = [model("small"), model("large")]


def rates(kernels: Iterable[str], shapes: Iterable[tuple[str, int, int]]) -> MachineSpeed:
    """A machine that is quicker the fewer bytes it reads."""

    def kernel(key: str) -> KernelRate:
        size = 2.0 if key in ("fp16", "bf16", "fp32") else QuantFormat.parse(key).bits / 8
        return KernelRate(size * 1e-10, size * 1e-10, 1e-11, size, 0.0)

    return MachineSpeed(
        machine={"cpu": "test", "instruction_set": "scalar"},
        threads=1,
        compute="int8",
        bandwidth=1e10,
        misses=[(1, 1.0)],
        overheads=Overheads(0, 0, 0, 1e-6, 0, 0),
        constant_bytes=10_000_000,
        kernels={key: kernel(key) for key in kernels},
        attention={
            attention_key(*shape): AttentionRate(*[int(shape[0].removeprefix("fp")) * 1e-8] * 3, 0, 1)
            for shape in shapes
        },
        created="2026-01-01T00:00:00+00:00",
    )


def choose(
    memory: int = 10**9, context: int = 512, models: list[PlanModel] | None = None, **more: Any
) -> Recommendation:
    options = {"points": POINTS, "laws": LAWS, "rates": rates, "constant": 10_000_000, "notes": ()}
    given = {name: more.pop(name) for name in tuple(more) if name in options}
    return make_recommendation(
        Requirements(memory, context, **more), MODELS if models is None else models, **{**options, **given}
    )


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
