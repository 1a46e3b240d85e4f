"""BitNet's ternary weights: packed, in floats beside a scale, and as they were trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from decoder_cases import saved_model
from packed_cases import Packed, assert_weights, edit_section, edit_tensors, read_all, refused, write_layer
from safetensors.torch import load_file, save_file

from kbit.backends.reference.backend import ReferenceBackend
from kbit.checkpoint.resolve import open_model as open_folder
from kbit.host.errors import CheckpointError, UnsupportedError
from kbit.models.load import load_decoder
from kbit.models.opening import open_model

pytestmark = pytest.mark.usefixtures("one_thread")

transformers = pytest.importorskip("transformers")
bitnet = pytest.importorskip("transformers.integrations.bitnet")

Pack = Callable[[torch.Size, torch.Generator], Packed]
SECTION: dict[str, Any] = {"quant_method": "bitnet"}
AUTO = {**SECTION, "linear_class": "autobitlinear", "quantization_mode": "offline"}
ONLINE = {**AUTO, "quantization_mode": "online"}


def ternary(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(-1, 2, shape, generator=generator).float()


def packed(*, divides: bool, dtype: torch.dtype = torch.bfloat16) -> Pack:
    def pack(shape: torch.Size, generator: torch.Generator) -> Packed:
        codes, scale = ternary(shape, generator), torch.tensor([1.37]).to(dtype)
        weight = codes * (1 / scale.float()) if divides else (codes * scale.float()).to(dtype)
        return Packed({"weight": bitnet.pack_weights(codes.clone()), "weight_scale": scale}, weight)

    return pack


def floats(shape: torch.Size, generator: torch.Generator) -> Packed:
    codes, scale = ternary(shape, generator).to(torch.bfloat16), torch.tensor([0.0213]).to(torch.bfloat16)
    return Packed({"weight": codes, "weight_scale": scale}, codes * scale)


def trained(shape: torch.Size, generator: torch.Generator) -> Packed:
    weight = torch.randn(shape, generator=generator)
    inverse = 1.0 / weight.double().abs().mean().float()
    return Packed({"weight": weight}, (weight * inverse).round().clamp(-1, 1) * (1 / inverse))


CASES: dict[str, tuple[dict[str, Any], Pack, str, str]] = {
    "BitLinear": (SECTION, packed(divides=True), "int2-row-fp32", "BitNet"),
    "AutoBitLinear": (AUTO, packed(divides=False), "int2-row-bf16", "BitNet"),
    "unpacked": (AUTO, floats, "BF16", "BitNet, unpacked"),
    "trained": (ONLINE, trained, "int2-row-fp32", "BitNet as trained"),
}


@pytest.mark.parametrize("case", CASES)
def test_weights(tmp_path: Path, case: str) -> None:
    section, pack, held, label = CASES[case]
    weights = write_layer(tmp_path / "m", section, pack)
    assert_weights(tmp_path / "m", weights, held, label)


def test_which_linears_are_trained_ones(tmp_path: Path) -> None:
    """Of all matrices but the embedding's, the head's and what the configuration names."""
    folder = tmp_path / "m"
    folder.mkdir()
    names = (
        "model.embed_tokens",
        "lm_head",
        "model.layers.0.q_proj",
        "model.layers.1.q_proj",
        "model.layers.10.q_proj",
    )
    save_file({f"{name}.weight": torch.randn(16, 16) for name in names}, folder / "model.safetensors")
    section = {**ONLINE, "modules_to_not_convert": ["model.layers.1"]}
    (folder / "config.json").write_text(json.dumps({"quantization_config": section}))
    with open_folder(str(folder)) as source:
        found = [name for name, info in source.tensors.items() if info.packed_as == "BitNet as trained"]
    assert sorted(found) == ["model.layers.0.q_proj.weight", "model.layers.10.q_proj.weight"]
    edit_section(folder, modules_to_not_convert=["(a+)+b"])
    refused(folder, "modules_to_not_convert .* names, not patterns", UnsupportedError)


def test_refuses(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    write_layer(folder, SECTION, packed(divides=True))
    read_all(folder)
    for key, value in (("linear_class", "other"), ("quantization_mode", "sometimes"), ("use_rms_norm", True)):
        edit_section(folder, **{key: value})
        refused(folder, f"{key} of the quantizer is '{value}'", UnsupportedError)
        edit_section(folder, linear_class="bitlinear", quantization_mode="offline", use_rms_norm=False)
    edit_tensors(folder, lambda tensors: tensors.update({"a.weight_scale": torch.zeros(1)}))
    refused(folder, "a.weight_scale is 0", CheckpointError)
    edit_tensors(folder, lambda tensors: tensors.update({"a.weight": torch.full((24, 128), 255, dtype=torch.uint8)}))
    refused(folder, "a.weight_scale is 0|a code that stands for no ternary value", CheckpointError)
    edit_tensors(folder, lambda tensors: tensors.update({"a.weight_scale": torch.ones(2)}))
    refused(folder, "a.weight_scale is F32", CheckpointError)


@torch.no_grad()
def test_a_model(tmp_path: Path) -> None:
    """The logits of the same weights in ordinary linears; transformers' own linears round what they read besides."""
    sizes = {"intermediate_size": 80, "num_key_value_heads": 2}
    plain = saved_model("bitnet", tmp_path / "plain", **sizes)
    shutil.copytree(tmp_path / "plain", tmp_path / "packed")
    tensors = load_file(tmp_path / "plain" / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name, parameter in plain.named_parameters():
        if "_proj" in name:
            codes, scale = ternary(parameter.shape, generator), torch.tensor([0.25])
            parameter.copy_(codes * scale)
            tensors |= {name: bitnet.pack_weights(codes), f"{name}_scale": scale}
    save_file(tensors, tmp_path / "packed" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    (tmp_path / "packed" / "config.json").write_text(json.dumps({**config, "quantization_config": AUTO}))
    ids = torch.randint(1, 131, (1, 30), generator=generator)
    with open_model(str(tmp_path / "packed")) as source:
        model = load_decoder(source, ReferenceBackend())
        found = model.forward(ids, model.new_cache(1, 30))
    wanted = plain(ids).logits
    assert float((found - wanted).abs().max() / wanted.abs().max()) <= 1e-4
    with torch.compiler.set_stance("force_eager"):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32).eval()
        rounded = theirs(ids).logits
    off = float((found - rounded).norm() / rounded.norm())
    print(f"without rounding, logits differ by {off:.2%} of their norm")
    assert 1e-4 < off < 0.1
