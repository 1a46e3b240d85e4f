"""MLX's folders open with the weights that it dequantizes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packed_cases import (
    Packed,
    assert_weights,
    draw,
    draw_scales,
    edit_section,
    edit_tensors,
    refused,
    stream_words,
    write_layer,
    write_packed,
)

from kbit.checkpoint.resolve import open_model
from kbit.host.errors import UnsupportedError

Pack = Callable[[torch.Size, torch.Generator], Packed]


def words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    return stream_words(codes, bits).view(torch.uint32)


def affine(bits: int, group: int, dtype: torch.dtype) -> Pack:
    def pack(shape: torch.Size, generator: torch.Generator) -> Packed:
        rows, columns = shape
        codes = draw((rows, columns), 2**bits, generator)
        scales = draw_scales((rows, columns // group), dtype, generator)
        biases = (-0.1 * torch.randn(scales.shape, generator=generator)).to(dtype)
        wide = [part.repeat_interleave(group, 1) for part in (scales, biases)]
        # Each operation of torch rounds to the type, as each of MLX does.
        weight = wide[0] * codes.to(dtype) + wide[1]
        return Packed({"weight": words(codes, bits), "scales": scales, "biases": biases}, weight)

    return pack


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def floats(mode: str) -> Pack:
    def pack(shape: torch.Size, generator: torch.Generator) -> Packed:
        rows, columns = shape
        block = 16 if mode == "nvfp4" else 32
        scales = (110 + draw((rows, columns // block), 20, generator)).to(torch.uint8)
        wide = 2.0 ** (scales.float() - 127)
        if mode == "nvfp4":
            scales = (50 * torch.rand(scales.shape, generator=generator)).to(torch.float8_e4m3fn).view(torch.uint8)
            wide = scales.view(torch.float8_e4m3fn).float()
        if mode == "mxfp8":
            eights = torch.randn((rows, columns), generator=generator).to(torch.float8_e4m3fn)
            codes, values = eights.view(torch.uint8).long(), eights.float()
        else:
            codes = draw((rows, columns), 16, generator)
            values = E2M1[codes]
        weight = (values * wide.repeat_interleave(block, 1)).to(torch.bfloat16)
        return Packed({"weight": words(codes, 8 if mode == "mxfp8" else 4), "scales": scales}, weight)

    return pack


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_affine(tmp_path: Path, bits: int, dtype: torch.dtype) -> None:
    group = 64 if bits % 2 else 32
    section = {"bits": bits, "group_size": group}
    weights = write_layer(tmp_path / "m", section, affine(bits, group, dtype), key="quantization")
    held = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}[dtype]
    assert_weights(tmp_path / "m", weights, held, f"MLX {bits}-bit")


MODES = {
    "mxfp4": (4, 32, "float4e2m1-b32-bf16"),
    "mxfp8": (8, 32, "float8e4m3-b32-bf16"),
    "nvfp4": (4, 16, "float4e2m1-b16-fp32"),
}


@pytest.mark.parametrize("mode", MODES)
def test_floats(tmp_path: Path, mode: str) -> None:
    bits, group, held = MODES[mode]
    weights = write_layer(tmp_path / "m", {"bits": bits, "group_size": group, "mode": mode}, floats(mode))
    assert_weights(tmp_path / "m", weights, held, f"MLX {mode}")


def test_layers_that_differ_and_embeddings(tmp_path: Path, packable_model: Path) -> None:
    """Every matrix is packed, the embedding too; layers named in the section have widths of their own."""
    eight, calls = "model.layers.1.mlp.down_proj", iter(range(10**6))
    names: list[str] = []

    def pack(shape: torch.Size, generator: torch.Generator) -> Packed:
        return (affine(8, 32, torch.float16) if next(calls) == at else affine(4, 64, torch.float16))(shape, generator)

    from safetensors.torch import load_file

    names = [name for name, t in load_file(packable_model / "model.safetensors").items() if t.ndim == 2]
    at = names.index(f"{eight}.weight")
    section: dict[str, Any] = {"bits": 4, "group_size": 64, eight: {"bits": 8, "group_size": 32}}
    weights = write_packed(packable_model, tmp_path / "m", section, pack, key="quantization", only="weight")
    with open_model(str(tmp_path / "m")) as source:
        assert "quantization" not in source.config
        assert source.tensors[f"{eight}.weight"].packed_as == "MLX 8-bit"
        assert source.tensors["model.embed_tokens.weight"].packed_as == "MLX 4-bit"
        for name, expected in weights.items():
            assert torch.equal(source.read(name).to(torch.float16), expected)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_against_the_library(tmp_path: Path, bits: int) -> None:
    """MLX quantizes and dequantizes."""
    mx = pytest.importorskip("mlx.core", reason="MLX is not installed")

    def pack(shape: torch.Size, generator: torch.Generator) -> Packed:
        weight = mx.array(torch.randn(shape, generator=generator).numpy()).astype(mx.float16)
        parts = mx.quantize(weight, group_size=64, bits=bits)
        found = torch.from_numpy(np.array(mx.dequantize(*parts, group_size=64, bits=bits)))
        tensors = [torch.from_numpy(np.array(part)) for part in parts]
        return Packed(dict(zip(("weight", "scales", "biases"), tensors, strict=True)), found)

    weights = write_layer(tmp_path / "m", {"bits": bits, "group_size": 64}, pack)
    assert_weights(tmp_path / "m", weights, "F16", f"MLX {bits}-bit")


@pytest.mark.parametrize(
    ("changes", "edit", "message"),
    [
        ({"bits": 8}, None, "scales is F16 .* but should be"),
        ({"bits": 7}, None, "bits 7 and group_size 32 .* kbit reads 2, 3, 4, 5, 6, 8 bits"),
        ({"group_size": 48}, None, "does not hold rows of 4 bits in groups of 48"),
        ({}, lambda t: t.pop("a.biases"), r"a\.biases is missing"),
        ({}, lambda t: t.pop("a.scales"), "a.biases belongs to a packed weight|neither a plain weight"),
        ({}, lambda t: t.pop("a.weight"), r"a\.weight is missing"),
    ],
)
def test_what_does_not_fit(tmp_path: Path, changes: dict[str, Any], edit: Any, message: str) -> None:
    section = {"bits": 4, "group_size": 32}
    write_layer(tmp_path / "m", section, affine(4, 32, torch.float16))
    edit_section(tmp_path / "m", **changes)
    if edit is not None:
        edit_tensors(tmp_path / "m", edit)
    refused(tmp_path / "m", message)


def test_what_is_not_read_is_refused(tmp_path: Path) -> None:
    write_layer(tmp_path / "m", {"bits": 4, "group_size": 32}, affine(4, 32, torch.float16))
    edit_section(tmp_path / "m", mode="fp3")
    refused(tmp_path / "m", "mode 'fp3' of MLX's quantization: kbit reads affine, mxfp4", UnsupportedError)
    edit_section(tmp_path / "m", mode="affine")
    edit_tensors(tmp_path / "m", lambda tensors: tensors.update({"a.global_scale": torch.ones(1)}))
    refused(tmp_path / "m", "a.global_scale: kbit reads MLX's weights without", UnsupportedError)
