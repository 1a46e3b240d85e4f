"""Hugging Face folders of fp8 weights: scales by block, row and tensor; which tensors are scales."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from kbit.checkpoint.readers.hf_folder import HFFolder
from kbit.host.errors import CheckpointError, UnsupportedError


def fp8_folder(tmp_path: Path, tensors: dict[str, torch.Tensor], block: list[int] | None = None) -> HFFolder:
    section: dict[str, Any] = {"quant_method": "fp8"}
    if block is not None:
        section["weight_block_size"] = block
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": section}))
    save_file(tensors, tmp_path / "model.safetensors")
    return HFFolder(tmp_path)


def fp8(rows: int, columns: int, dtype: torch.dtype = torch.float8_e4m3fn) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * columns)
    return (torch.randn(rows, columns, generator=generator) * 50).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize(
    ("rows", "columns", "block"),
    [
        (256, 256, None),
        (200, 130, None),  # no multiple of 128 either way
        (1, 300, None),
        (300, 1, None),
        (127, 128, [128, 128]),
        (10, 12, [4, 8]),
        (9, 16, [1, 8]),  # one row of scales per row of weights
        (16, 9, [8, 1]),
    ],
)
def test_fp8_blocks(tmp_path: Path, rows: int, columns: int, block: list[int] | None, dtype: torch.dtype) -> None:
    weight = fp8(rows, columns, dtype)
    high, wide = block or (128, 128)
    scale = torch.rand(-(-rows // high), -(-columns // wide), generator=torch.Generator().manual_seed(1)) + 0.5
    expected = weight.float() * scale[torch.arange(rows)[:, None] // high, torch.arange(columns)[None] // wide]
    with fp8_folder(tmp_path, {"a.weight": weight, "a.weight_scale_inv": scale}, block) as source:
        assert list(source.tensors) == ["a.weight"]
        assert source.tensors["a.weight"].nbytes == rows * columns + 4 * scale.numel()
        assert torch.equal(source.read("a.weight"), expected)
        for start, stop in ((0, rows), (rows // 3, rows - rows // 4), (rows - 1, rows)):
            assert torch.equal(source.read_rows("a.weight", start, stop), expected[start:stop])


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_fp8_scale_per_tensor(tmp_path: Path, shape: tuple[int, ...]) -> None:
    weight, scale = fp8(7, 9), torch.full(shape, 0.37)
    with fp8_folder(tmp_path, {"a.weight": weight, "a.weight_scale": scale}) as source:
        assert torch.equal(source.read("a.weight"), weight.float() * scale.reshape(()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(200,), (200, 1)], ids=str)
def test_fp8_scale_per_row(tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = fp8(200, 9)
    scale = (torch.rand(shape, generator=torch.Generator().manual_seed(2)) + 0.5).to(dtype)
    expected = weight.float() * scale.float().reshape(-1, 1)
    with fp8_folder(tmp_path, {"a.weight": weight, "a.weight_scale": scale}) as source:
        assert torch.equal(source.read("a.weight"), expected)
        assert torch.equal(source.read_rows("a.weight", 130, 140), expected[130:140])


@pytest.mark.parametrize("shape", [(3,), (2, 3), (9,), (1, 7), (7, 9), (1, 1, 7)], ids=str)
def test_fp8_scale_that_fits_nothing(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with (
        fp8_folder(tmp_path, {"a.weight": fp8(7, 9), "a.weight_scale_inv": torch.ones(shape)}) as source,
        pytest.raises(UnsupportedError, match=r"a\.weight_scale_inv of shape .* does not fit a\.weight"),
    ):
        source.read("a.weight")


def test_fp8_without_its_scale(tmp_path: Path) -> None:
    """Read as they are, the weights would be wrong by orders of magnitude without a word."""
    with pytest.raises(CheckpointError, match=r"a\.weight is fp8, but its scale is missing"):
        fp8_folder(tmp_path, {"a.weight": fp8(7, 9), "b.weight_scale_inv": torch.ones(1, 1)})


def test_plain_fp8_needs_no_scale(tmp_path: Path) -> None:
    weight = fp8(7, 9)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    save_file({"a.weight": weight}, tmp_path / "model.safetensors")
    with HFFolder(tmp_path) as source:
        assert torch.equal(source.read("a.weight"), weight.float())


def test_scales_of_unquantized_tensors_are_tensors(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.ones(2, 2), "a.weight_scale": torch.ones(1)}
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    save_file(tensors, tmp_path / "model.safetensors")
    with HFFolder(tmp_path) as source:
        assert set(source.tensors) == set(tensors)
