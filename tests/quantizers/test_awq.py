"""AWQ: scaling features changes nothing but the rounding, and the rounding's errors get less."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kbit.backends.reference.backend import ReferenceBackend
from kbit.calibration.request import CalibrationRequest
from kbit.checkpoint.resolve import open_model
from kbit.checkpoint.source import CheckpointSource
from kbit.formats.blockwise import quantize_blockwise
from kbit.formats.quant_format import QuantFormat
from kbit.graph.batch import Batch
from kbit.models.families import spec_from_config
from kbit.models.load import load_decoder
from kbit.models.structure import recorded
from kbit.quantizers.awq import ActivationAware, ScaledView, round_clipped
from kbit.quantizers.convert import convert
from kbit.quantizers.method import MethodInput
from kbit.quantizers.plan import make_plan

METHOD = ActivationAware(CalibrationRequest(tokens=256))
NORM, UP = "model.layers.0.input_layernorm.weight", "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, write_model: Any) -> Path:
    return write(tmp_path_factory.mktemp("awq") / "model", write_model, torch.float16)


def write(folder: Path, write_model: Any, dtype: torch.dtype) -> Path:
    """With biases, two query heads for one of values, and features of very different size."""
    write_model(folder, attention_bias=True, mlp_bias=True, dtype=dtype)
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    for name, values in tensors.items():
        if "norm" in name and "layers" in name:
            values[::7] *= 20
    save_file(tensors, folder / "model.safetensors")
    return folder


def view(source: CheckpointSource, format: str, overrides: tuple[tuple[str, str], ...] = ()) -> ScaledView:
    plan = make_plan(source, QuantFormat.parse(format), overrides=overrides, method=METHOD)
    made = METHOD.apply(MethodInput(source, plan))
    assert isinstance(made, ScaledView)
    return made


class Unrounded(ScaledView):
    """The scaled model itself."""

    def read_weight(self, name: str) -> torch.Tensor:
        return self.target(name)


def logits(source: CheckpointSource) -> torch.Tensor:
    decoder = load_decoder(source, ReferenceBackend())
    ids = np.arange(40) % 250
    found: torch.Tensor = decoder.run(Batch.packed(ids, np.array([40]), np.array([0])), decoder.new_cache(1, 40))
    return torch.as_tensor(found)


def test_scaling_changes_nothing(tmp_path: Path, write_model: Any) -> None:
    with open_model(str(write(tmp_path / "model", write_model, torch.float32))) as source:
        scaled = view(source, "int8-b32")
        scaled.__class__ = Unrounded
        assert not torch.equal(scaled.read(NORM), source.read(NORM))
        assert not torch.equal(scaled.read(UP), source.read(UP))
        found, expected = logits(scaled), logits(source)
    # Products of scaled numbers round as those before, to 2^-24 of the sums of 80 of them.
    assert float((found - expected).abs().max()) < 80 * 2**-24 * float(expected.abs().max())


def test_norms_are_stored_as_they_are_used(model: Path) -> None:
    with open_model(str(model)) as source:
        scaled = view(source, "nf3-b32")
        for name, info in source.tensors.items():
            if "layernorm" in name:
                values = scaled.read_rows(name, 0, info.shape[0])
                assert torch.allclose(values.half().float(), values, rtol=1e-6, atol=0)


def test_eight_bits_are_the_model(tmp_path: Path, model: Path) -> None:
    """Written and read again, the biases in float16: off by what 8 bits are off, and no more."""
    with open_model(str(model)) as source:
        plan = make_plan(source, QuantFormat.parse("int8-b32"), method=METHOD)
        convert(source, plan, tmp_path / "out")
        expected = logits(source)
    with open_model(str(tmp_path / "out")) as quantized:
        found = logits(quantized)
    assert float((found - expected).norm()) < 0.02 * float(expected.norm())


@pytest.mark.parametrize("format", ["nf3-b32", "int3-b32", "int4-b16-asym", "lloyd3-row"])
def test_outputs_are_less_off(model: Path, format: str) -> None:
    parsed = QuantFormat.parse(format)
    with open_model(str(model)) as source:
        scaled = view(source, format)
        factors = scaled._factors(0)
        total = {"awq": 0.0, "rtn": 0.0}
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
            full = f"model.layers.0.{name}.weight"
            scaling = scaled._scaling(full)
            values = scaled.read_quantized(full).dequantize() / scaling.columns
            made = values if scaling.rows is None else values * scaling.rows[:, None]
            plain = quantize_blockwise(source.read(full), parsed).dequantize()
            total["awq"] += factors[full].divergence(made - source.read(full))
            total["rtn"] += factors[full].divergence(plain - source.read(full))
    assert total["awq"] < 0.8 * total["rtn"]


def test_kept_matrices_stay_as_they_are(model: Path) -> None:
    with open_model(str(model)) as source:
        scaled = view(source, "nf3-b32", overrides=(("*.k_proj.weight", "keep"), ("*.down_proj.weight", "keep")))
        assert torch.equal(scaled.read(NORM), source.read(NORM))
        for name in source.tensors:
            if "k_proj.weight" in name or "down_proj.weight" in name:
                assert torch.equal(scaled.read(name), source.read(name))
        assert not torch.equal(scaled.target(UP), source.read(UP))  # by the norm before it


def test_seams_of_a_model(model: Path) -> None:
    with open_model(str(model)) as source:
        spec = spec_from_config(source.config)
    layer = "model.layers.0."
    attention, mlp = f"{layer}self_attn.", f"{layer}mlp."
    found = {seam.producer: seam for seam in recorded(spec).seams() if seam.producer.startswith(layer)}
    assert found[f"{layer}input_layernorm.weight"].consumers == tuple(f"{attention}{x}_proj.weight" for x in "qkv")
    assert found[f"{layer}post_attention_layernorm.weight"].consumers == (
        f"{mlp}gate_proj.weight",
        f"{mlp}up_proj.weight",
    )
    values, product = found[f"{attention}v_proj.weight"], found[f"{mlp}up_proj.weight"]
    assert (values.consumers, values.biases, values.kind) == (
        (f"{attention}o_proj.weight",),
        (f"{attention}v_proj.bias",),
        "values",
    )
    assert (product.consumers, product.biases, product.kind) == (
        (f"{mlp}down_proj.weight",),
        (f"{mlp}up_proj.bias",),
        "product",
    )
    assert len(found) == 4


@pytest.mark.parametrize("shape", [(3, 50), (1, 16), (5, 64)])
@pytest.mark.parametrize("text", ["int3-b32", "int4-b16-asym", "nf4-b32-dq", "lloyd3-row"])
def test_cut_ranges_are_the_best_of_those_tried(text: str, shape: tuple[int, int]) -> None:
    """Blocks on their own: with equal inputs, the squared error falls."""
    format, generator = QuantFormat.parse(text), torch.Generator().manual_seed(1)
    weight = torch.randn(shape, generator=generator)
    inputs = torch.eye(shape[1])
    cut = (round_clipped(weight, format, inputs).dequantize() - weight).square().sum()
    plain = (quantize_blockwise(weight, format).dequantize() - weight).square().sum()
    assert float(cut) <= float(plain) * (1.02 if format.double_quant else 1 + 1e-6)
