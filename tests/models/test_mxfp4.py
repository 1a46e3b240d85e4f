"""gpt-oss's files with experts in MXFP4, against what transformers makes of the same blocks; and damaged ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from decoder_cases import saved_model
from safetensors.torch import load_file, save_file

from kbit.backends.cpu.backend import NativeBackend
from kbit.backends.reference.backend import ReferenceBackend
from kbit.formats.quant_tensor import QuantTensor
from kbit.host.errors import CheckpointError, KbitError
from kbit.models.load import load_decoder
from kbit.models.opening import open_model

pytestmark = pytest.mark.usefixtures("one_thread")
transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "layer_types": None}


def packed_model(folder: Path) -> Any:
    """A model whose experts are random blocks; and what transformers has for it: the numbers that it says they are."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    theirs = saved_model("gpt-oss", folder, **SIZES)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    state = theirs.state_dict()
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(120, 125, (experts, rows, columns // 32), dtype=torch.uint8, generator=generator)
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = blocks, scales
        state[name].copy_(convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (folder / "config.json").write_text(json.dumps(config))
    return theirs


@torch.no_grad()
def test_logits_and_bits(tmp_path: Path) -> None:
    """In 4.5 bits a weight, each exactly the number that transformers has."""
    theirs = packed_model(tmp_path)
    ids = torch.randint(1, 131, (2, 30), generator=torch.Generator().manual_seed(1))
    expected = theirs(ids).logits
    with open_model(str(tmp_path)) as source:
        name = "model.layers.1.mlp.experts.3.up_proj.weight"
        assert source.tensors[name].stored_as == "float4e2m1-b32-bf16"
        weight = source.read_weight(name)
        assert isinstance(weight, QuantTensor)
        whole = theirs.model.layers[1].mlp.experts.gate_up_proj[3]
        assert torch.equal(weight.dequantize(), whole[:, 1::2].T)
        assert torch.equal(source.read(name), whole[:, 1::2].T)
        assert weight.bits_per_weight == 4.5
        reference = load_decoder(source, ReferenceBackend())
        native = load_decoder(source, NativeBackend(2, compute="fp32", kv="fp32"))
    for model in (reference, native):
        found = model.forward(ids, model.new_cache(2, 30))
        assert float((found - expected).abs().max() / expected.abs().max()) < 1e-4


def test_conversion(tmp_path: Path) -> None:
    """What is packed already can be rounded again, and reads back without the original."""
    from kbit.formats.quant_format import QuantFormat
    from kbit.quantizers.convert import convert
    from kbit.quantizers.plan import make_plan

    packed_model(tmp_path / "m")
    with open_model(str(tmp_path / "m")) as source:
        convert(source, make_plan(source, QuantFormat.parse("int8-b32")), tmp_path / "out")
        name = "model.layers.0.mlp.experts.1.down_proj.weight"
        original = source.read(name)
    with open_model(str(tmp_path / "out")) as source:
        load_decoder(source, ReferenceBackend())
        assert float((source.read(name) - original).norm() / original.norm()) < 0.01


def without_scales(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.0.mlp.experts.down_proj_scales"]


def short_scales(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.0.mlp.experts.down_proj_scales"
    tensors[name] = tensors[name][:, :, :1].contiguous()


def few_experts(tensors: dict[str, torch.Tensor]) -> None:
    for end in ("blocks", "scales"):
        name = f"model.layers.0.mlp.experts.down_proj_{end}"
        tensors[name] = tensors[name][1:].contiguous()


def no_number(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.mlp.experts.down_proj_scales"][2, 0, 0] = 255


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_scales, r"experts\.down_proj_scales is missing; download"),
        (short_scales, r"down_proj_blocks .* are no MXFP4 blocks"),
        (few_experts, r"down_proj has shape \(4, 64, 96\), but config.json asks for \(5, 64, 96\)"),
        (no_number, r"down_proj_scales holds 255, which is no number"),
    ],
)
def test_damage(tmp_path: Path, damage: Callable[[dict[str, torch.Tensor]], None], message: str) -> None:
    packed_model(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message), open_model(str(tmp_path)) as source:
        load_decoder(source, ReferenceBackend())


def test_blocks_that_the_configuration_does_not_know(tmp_path: Path) -> None:
    packed_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(KbitError, match="missing"), open_model(str(tmp_path)) as source:
        load_decoder(source, ReferenceBackend())
