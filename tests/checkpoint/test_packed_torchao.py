"""torchao's folders open with the weights that the library dequantizes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_cases import assert_weights, draw, draw_scales, refused
from safetensors.torch import save_file

from kbit.host.errors import CheckpointError, UnsupportedError

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SHAPE = (96, 128)
Layer = tuple[dict[str, torch.Tensor], dict[str, Any], torch.Tensor]


def integers(
    bits: int, groups: int, dtype: torch.dtype, *, zeros: bool, kind: str = "IntxUnpackedToInt8Tensor"
) -> Layer:
    """Tensors by the end of their names, what the metadata says, and the weight."""
    generator = torch.Generator().manual_seed(bits)
    rows, columns = SHAPE
    middle = 2 ** (bits - 1)
    scales = draw_scales((rows, groups), dtype, generator)
    zero = (
        draw((rows, groups), 2**bits, generator) - middle if zeros else torch.zeros((rows, groups), dtype=torch.int64)
    )
    codes = draw(SHAPE, 2**bits, generator) - middle
    tensors = {"qdata": codes.to(torch.int8), "scale": scales, "zero_point": zero.to(torch.int8)}
    settings = {"block_size": [1, columns // groups], "target_dtype": {"_type": "torch.dtype", "_data": f"int{bits}"}}
    if kind == "Int8Tensor":
        del settings["target_dtype"]
    repeat = columns // groups
    weight = (codes - zero.repeat_interleave(repeat, 1)).to(dtype) * scales.repeat_interleave(repeat, 1)
    return tensors, {"_type": kind, "_data": settings}, weight


def floats(scale: tuple[int, int]) -> Layer:
    generator = torch.Generator().manual_seed(1)
    codes = (100 * torch.randn(SHAPE, generator=generator)).clamp(-448, 448).to(torch.float8_e4m3fn)
    scales = draw_scales(scale, F32, generator)
    wide = scales.repeat_interleave(SHAPE[0] // scale[0], 0).repeat_interleave(SHAPE[1] // scale[1], 1)
    settings = {"block_size": [SHAPE[0] // scale[0], SHAPE[1] // scale[1]], "act_quant_kwargs": None}
    return {"qdata": codes, "scale": scales}, {"_type": "Float8Tensor", "_data": settings}, codes.float() * wide


def write(folder: Path, layer: Layer, *, described: bool = True) -> dict[str, torch.Tensor]:
    tensors, entry, weight = layer
    folder.mkdir()
    metadata = {"a.weight": json.dumps(entry), "tensor_names": json.dumps(["a.weight"])} if described else {}
    save_file({f"a._weight_{end}": part for end, part in tensors.items()}, folder / "model.safetensors", metadata)
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "torchao"}}))
    return {"a.weight": weight}


CASES: dict[str, tuple[Callable[[], Layer], str, str]] = {
    "int4": (lambda: integers(4, 4, BF16, zeros=False), "int4-b32-bf16", "int4"),
    "int4 with zeros": (lambda: integers(4, 4, F16, zeros=True), "int4-b32-asym-fp32", "int4"),
    "int3": (lambda: integers(3, 2, F16, zeros=False), "int3-b64", "int3"),
    "int8 by row": (lambda: integers(8, 1, BF16, zeros=False, kind="Int8Tensor"), "int8-row-bf16", "int8"),
    "groups of 8": (lambda: integers(4, 16, F32, zeros=True), "F32", "int4"),
    "fp8 by row": (lambda: floats((96, 1)), "float8e4m3-row-fp32", "fp8"),
    "fp8 by matrix": (lambda: floats((1, 1)), "float8e4m3-row-fp32", "fp8"),
}


@pytest.mark.parametrize("case", CASES)
def test_weights(tmp_path: Path, case: str) -> None:
    make, held, label = CASES[case]
    assert_weights(tmp_path / "m", write(tmp_path / "m", make()), held, f"torchao {label}")


def test_against_the_library(tmp_path: Path) -> None:
    """It quantizes, flattens for a file, and dequantizes."""
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import Int8Tensor, IntxUnpackedToInt8Tensor, PerGroup, PerRow

    drawn = 0.1 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
    made = {
        "intx": IntxUnpackedToInt8Tensor.from_hp(drawn.bfloat16(), (1, 32), torch.int4),
        "int8": Int8Tensor.from_hp(drawn.half(), PerRow()),
    }
    assert PerGroup is not None
    for name, tensor in made.items():
        data, metadata = flatten_tensor_state_dict({"a.weight": tensor})
        (tmp_path / name).mkdir()
        save_file(
            {key: part.contiguous() for key, part in data.items()}, tmp_path / name / "model.safetensors", metadata
        )
        (tmp_path / name / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "torchao"}}))
        label = "int4" if name == "intx" else "int8"
        assert_weights(tmp_path / name, {"a.weight": tensor.dequantize()}, "", f"torchao {label}")


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"_type": "Int4TilePackedTo4dTensor"}, UnsupportedError, "is torchao's Int4TilePackedTo4dTensor: of its"),
        ({"_data": {"block_size": [2, 32]}}, UnsupportedError, r"block_size \[2, 32\] of a.weight"),
        ({"_data": {"target_dtype": {"_data": "uint4"}}}, UnsupportedError, "target_dtype 'uint4' of a.weight"),
        ({"_data": 3}, CheckpointError, "the file's metadata does not say what a.weight is"),
    ],
)
def test_what_is_not_read_is_refused(
    tmp_path: Path, change: dict[str, Any], kind: type[CheckpointError], message: str
) -> None:
    tensors, entry, weight = integers(4, 4, F16, zeros=False)
    write(tmp_path / "m", (tensors, {**entry, **change}, weight))
    refused(tmp_path / "m", message, kind)


def test_damage(tmp_path: Path) -> None:
    tensors, entry, weight = integers(4, 4, F16, zeros=True)
    write(tmp_path / "undescribed", (tensors, entry, weight), described=False)
    refused(tmp_path / "undescribed", "the file's metadata does not say what a.weight is")
    tensors["qdata"][3, 3] = 9
    write(tmp_path / "codes", (tensors, entry, weight))
    refused(tmp_path / "codes", "holds codes outside of 4 bits")
    short = {**tensors, "scale": tensors["scale"][:, :3].contiguous()}
    write(tmp_path / "scales", (short, entry, weight))
    refused(tmp_path / "scales", "does not fit a matrix of")
