"""tools/make_synthetic_checkpoint.py: what it writes can be opened, and quantized rows are those of the source."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from module_cases import module_of

from kbit.checkpoint.resolve import open_model
from kbit.formats.blockwise import quantize_blockwise
from kbit.formats.quant_format import QuantFormat
from kbit.formats.quant_tensor import QuantTensor
from kbit.models.check import check_tensors
from kbit.models.families import spec_from_config


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return module_of("tools/make_synthetic_checkpoint.py")


def test_quantized(tool: ModuleType, tmp_path: Path) -> None:
    """More rows than a tile, fewer, and a number of them that no tile divides; embedding and head of their own."""
    shape = tool.Shape(64, 328, 4, 2, 600, tie_word_embeddings=False)
    size = tool.make_quantized(tmp_path / "model", 4, shape=shape, layers=1)
    source = tool.synthetic_source(shape, 1)
    with open_model(str(tmp_path / "model")) as model:
        check_tensors(model, spec_from_config(model.config))
        assert sum(info.nbytes for info in model.tensors.values()) <= size
        for name, info in model.tensors.items():
            written, weight = model.read_weight(name), source.read(name)
            if len(info.shape) == 1:
                assert torch.equal(model.read(name), torch.ones(info.shape))
                continue
            assert isinstance(written, QuantTensor)
            bits = 4 if ".layers." in name else 8
            assert written.format == QuantFormat("nf" if bits == 4 else "int", bits, 64)
            assert torch.equal(written.dequantize(), quantize_blockwise(weight, written.format).dequantize())
        assert "tokenizer.json" in model.sidecar_files()


def test_sixteen_bits(tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several shards, an index, and one outlier a matrix."""
    monkeypatch.setattr(tool, "SMALL", tool.Shape(64, 128, 4, 2, 300))
    monkeypatch.setattr(tool, "SHARD_BYTES", 60_000)
    total = tool.make(tmp_path / "model", 200_000 / 1e9)
    with open_model(str(tmp_path / "model")) as model:
        check_tensors(model, spec_from_config(model.config))
        assert sum(info.nbytes for info in model.tensors.values()) == total
        assert len({info.file for info in model.tensors.values()}) > 1
        weight = model.read("model.layers.0.mlp.up_proj.weight")
        assert weight.abs().max() > 10 * weight.std()
