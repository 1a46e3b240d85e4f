"""A method of a file of its own, and an entry in the registry: `kbit quantize` and `kbit scale` take it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conversion_cases import Stopped, files_of, quantize
from toy_method import NORM, READERS, Shifted
from typer.testing import CliRunner

from kbit.backends.reference.backend import ReferenceBackend
from kbit.checkpoint.resolve import open_model
from kbit.cli.main import build
from kbit.formats.quant_format import QuantFormat
from kbit.formats.quant_tensor import QuantTensor
from kbit.host.errors import UsageError
from kbit.models.load import load_decoder
from kbit.quantizers.method import MethodInput
from kbit.quantizers.methods import METHODS, get_method
from kbit.quantizers.plan import TensorPlan, make_plan
from kbit.scaling.sweep.grid import expand


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, Shifted.name, Shifted())
        yield


def test_it_writes_what_it_yields_kept_tensors_too(tiny_model: Path, tmp_path: Path) -> None:
    """Norms are divided; what reads them is that of doubled weights; all the rest is as if rounded to nearest."""
    quantize(tiny_model, tmp_path / "rtn")
    result = CliRunner().invoke(
        build([]), ["quantize", str(tiny_model), "--method", "shifted", "-o", str(tmp_path / "out")]
    )
    assert result.exit_code == 0, result.output
    with open_model(str(tmp_path / "rtn")) as plain, open_model(str(tmp_path / "out")) as shifted:
        for name in plain.tensors:
            factor = 0.5 if name.endswith(NORM) else 2.0 if name.endswith(READERS) else 1.0
            assert torch.equal(shifted.read(name), plain.read(name) * factor), name
        prompt = torch.arange(1, 9)[None]
        models = [load_decoder(source, ReferenceBackend()) for source in (plain, shifted)]
        logits = [model.forward(prompt, model.new_cache(1, 16)) for model in models]
    assert torch.equal(*logits)  # powers of two move without rounding


def test_plan_and_manifest_say_which_method_and_its_settings(tiny_model: Path, tmp_path: Path) -> None:
    identity = {"name": "shifted", "version": 1, "settings": {"factor": 4.0}}
    quantize(tiny_model, tmp_path / "out", plan={"method": Shifted(4.0)})
    assert json.loads((tmp_path / "out" / "kbit-manifest.json").read_text())["method"] == identity
    quantize(tiny_model, tmp_path / "rtn")
    assert json.loads((tmp_path / "rtn" / "kbit-manifest.json").read_text())["method"]["name"] == "rtn"
    with open_model(str(tiny_model)) as source:
        plans = [make_plan(source, QuantFormat(), method=method) for method in (Shifted(), Shifted(4.0), Shifted(4.0))]
        plans.append(make_plan(source, QuantFormat()))
    ids = [plan.plan_id for plan in plans]
    assert ids[1] == ids[2]
    assert len(set(ids)) == 3


def test_an_interrupted_run_goes_on_with_the_same_settings_only(small_model: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    quantize(small_model, whole, "int3-b32-asym-dq", plan={"shard_bytes": 1200, "method": Shifted()})
    written: list[TensorPlan] = []

    def stop(tensor: TensorPlan) -> None:
        written.append(tensor)
        if len(written) == 5:
            raise Stopped

    with pytest.raises(Stopped):
        quantize(small_model, out, "int3-b32-asym-dq", plan={"shard_bytes": 1200, "method": Shifted()}, on_tensor=stop)
    with pytest.raises(UsageError, match="an interrupted run with another source or other settings is there"):
        quantize(small_model, out, "int3-b32-asym-dq", plan={"shard_bytes": 1200, "method": Shifted(4.0)})
    done = quantize(small_model, out, "int3-b32-asym-dq", plan={"shard_bytes": 1200, "method": Shifted()})
    assert done.resumed == 5
    assert files_of(out) == files_of(whole)


def test_a_sweep_takes_it(tiny_model: Path) -> None:
    """As weights to measure: the same codes as a conversion writes."""
    cells, left_out = expand((4,), ("nf",), (64,), ("rtn", "shifted"))
    assert [cell.method for cell in cells if cell.format is not None] == ["rtn", "shifted"]
    assert not left_out
    name = "model.layers.0.self_attn.q_proj.weight"
    with open_model(str(tiny_model)) as source:
        plan = make_plan(source, QuantFormat(), method=get_method("shifted"))
        made = get_method("shifted").apply(MethodInput(source, plan, source.read))
        weight = made.read_weight(name)
        assert isinstance(weight, QuantTensor)
        assert torch.equal(made.target(name), source.read(name) * 2)


def test_what_cannot_be_stored_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    for method, problem in (("outliers", "makes no format that kbit stores"), ("nearest", "is unknown")):
        arguments = ["quantize", str(tiny_model), "--method", method, "-o", str(tmp_path / "out")]
        result = CliRunner().invoke(build([]), arguments)
        assert result.exit_code != 0
        assert f"method '{method}' {problem}" in result.output + str(result.exception)
    assert not (tmp_path / "out").exists()
