"""Matrices that a source holds quantized already stay as they are: bit for bit, and at no cost in a mix of widths."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from error_cases import run_command
from gguf_model_cases import Model
from packed_cases import awq, write_packed

from kbit.backends.cpu.backend import NativeBackend
from kbit.calibration.request import CalibrationRequest
from kbit.checkpoint.gguf.source import GGUFSource
from kbit.checkpoint.resolve import open_model
from kbit.checkpoint.source import CheckpointSource
from kbit.formats.quant_format import QuantFormat
from kbit.formats.quant_tensor import QuantTensor
from kbit.host.errors import UsageError
from kbit.models.load import load_decoder
from kbit.quantizers.calibrated import CalibratedRounding, TwoSided
from kbit.quantizers.convert import convert
from kbit.quantizers.methods import get_method
from kbit.quantizers.mixed import Budget, mixed_formats
from kbit.quantizers.plan import make_plan
from kbit.quantizers.plan_file import read_plan_file, write_plan_file
from kbit.quantizers.trellis import Trellis

NF4 = QuantFormat.parse("nf4-b32")
TYPES = ("Q4_1", "Q8_0", "Q5_0", "Q4_0")


@pytest.fixture
def quantized_gguf(tmp_path: Path) -> Path:
    """Matrices of one type after another; norms are float32."""
    model = Model()
    for index, (name, (values, _)) in enumerate(model.stored.items()):
        if values.ndim == 2:
            kind = gguf.GGMLQuantizationType[TYPES[index % len(TYPES)]]
            model.stored[name] = (gguf.quants.quantize(values, kind), kind)
    return model.write(tmp_path / "m.gguf")


def logits(source: CheckpointSource) -> np.ndarray:
    decoder = load_decoder(source, NativeBackend(2, compute="fp32"))
    return decoder.extend(list(range(20)), decoder.new_cache(1, 20), last_only=False)


def check_same(source: CheckpointSource, out: Path) -> None:
    """A folder whose matrices are all as the source has them."""
    with open_model(str(out)) as made:
        for name, info in source.tensors.items():
            held = made.read_weight(name)
            if isinstance(source.read_weight(name), QuantTensor):
                assert isinstance(held, QuantTensor)
                assert str(held.format).startswith("levels")
                held = held.dequantize()
                assert torch.equal(held, source.read(name)), info
        assert np.array_equal(logits(source), logits(made))


def test_a_gguf_file_becomes_a_folder_of_the_same_bits(quantized_gguf: Path, tmp_path: Path) -> None:
    with GGUFSource(quantized_gguf) as source:
        plan = make_plan(source, NF4, overrides=[("*", "stored"), ("*norm*", "f32")])
        assert {t.label for t in plan.tensors if t.role == "linear"} >= {
            "levels4-b32-asym",
            "levels8-b32",
            "levels5-b32",
        }
        convert(source, plan, tmp_path / "out")
        check_same(source, tmp_path / "out")


@pytest.fixture
def packed_model(packable_model: Path, tmp_path: Path) -> Path:
    """Linear layers by AWQ, which kbit holds at 6 bits a weight; the embedding in floats."""
    write_packed(packable_model, tmp_path / "m", {"quant_method": "awq", "bits": 4, "group_size": 32}, awq(32))
    return tmp_path / "m"


def test_weights_of_another_quantizer(packed_model: Path, tmp_path: Path) -> None:
    with open_model(str(packed_model)) as source:
        convert(source, make_plan(source, NF4, overrides=[("*", "stored"), ("*norm*", "f32")]), tmp_path / "out")
        check_same(source, tmp_path / "out")


@pytest.mark.parametrize("kind", [TwoSided, Trellis])
def test_widths_are_mixed_with_what_costs_nothing(packed_model: Path, kind: type[CalibratedRounding]) -> None:
    """Where there is room for all that is stored, that is chosen; below, some of it."""
    method = kind(CalibrationRequest(tokens=256))
    format = method.format(4, fast=True) or NF4
    with open_model(str(packed_model)) as source:
        plan = make_plan(source, format, method=method)
        linear = sum(t.source.numel for t in plan.tensors if t.role == "linear")
        kept = plan.bytes_after - sum(t.nbytes for t in plan.tensors if t.role == "linear")
        # (A codebook comes with every matrix.)
        roomy = mixed_formats(source, plan, method, Budget(nbytes=kept + linear * 6 // 8 + 14 * 64), ())
        assert {choice.format for choice in roomy.chosen.values()} == {"stored"}
        assert roomy.cost == 0
        tight = mixed_formats(source, plan, method, Budget(nbytes=kept + linear * 5 // 8), ())
        assert 0 < sum(choice.format == "stored" for choice in tight.chosen.values()) < len(tight.chosen)
        chosen = {name: choice.format for name, choice in tight.chosen.items()}
        mixed = make_plan(source, format, formats=chosen, method=method)
        assert sum(t.nbytes for t in mixed.tensors if t.role == "linear") == tight.nbytes <= linear * 5 // 8


def test_a_plan_file_says_so(quantized_gguf: Path, tmp_path: Path) -> None:
    with GGUFSource(quantized_gguf) as source:
        plan = make_plan(source, NF4, overrides=[("*q_proj*", "stored")])
        write_plan_file(tmp_path / "plan.json", source, plan, plan.method, {})
        name = "model.layers.0.self_attn.q_proj.weight"
        assert json.loads((tmp_path / "plan.json").read_text())["tensors"][name]["to"] == "stored"
        again = make_plan(source, NF4, formats=read_plan_file(tmp_path / "plan.json").targets)
        assert again.plan_id == plan.plan_id


def test_floats_are_kept(tiny_model: Path) -> None:
    with open_model(str(tiny_model)) as source:
        plan = make_plan(source, NF4, overrides=[("*q_proj*", "stored")])
        assert all(t.format is None and not t.as_stored for t in plan.tensors if "q_proj" in t.source.name)


def test_a_method_that_changes_weights_is_refused(quantized_gguf: Path) -> None:
    with GGUFSource(quantized_gguf) as source, pytest.raises(UsageError, match="awq changes weights"):
        make_plan(source, NF4, overrides=[("*q_proj*", "stored")], method=get_method("awq"))


def test_nothing_is_rounded_to_a_table(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, _, error = run_command(
        ["quantize", str(tiny_model), "--format", "levels4-b32", "--method", "rtn", "-o", str(out)]
    )
    assert code == 2
    assert 'nothing is rounded to levels4-b32; "stored" keeps what is quantized as it is' in error
    assert not out.exists()
