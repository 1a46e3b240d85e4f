"""Converting a model with the GPU's kernels writes the bytes that the CPU writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest
import torch
from conversion_cases import files_of
from typer.testing import CliRunner

from kbit.checkpoint.readers.hf_folder import HFFolder
from kbit.cli.main import build
from kbit.formats.quant_format import QuantFormat
from kbit.formats.trellis import TrellisFormat
from kbit.formats.trellis_code import search, searching_with
from kbit.host.errors import KbitError, UnsupportedError, UsageError
from kbit.quantizers.convert import convert, on_gpu
from kbit.quantizers.plan import make_plan

if TYPE_CHECKING:
    from kbit.checkpoint.source import CheckpointSource

pytest.importorskip("triton")


@pytest.mark.parametrize("format", ["nf4-b64", "int3-b16-asym-dq", "quantile5-b32", "int8-row-fp32"])
def test_same_files(device: str, tmp_path: Path, small_model: Path, format: str) -> None:
    with HFFolder(small_model) as source:
        plan = make_plan(source, QuantFormat.parse(format), embedding_bits=8)
        convert(source, plan, tmp_path / "cpu")
        convert(source, plan, tmp_path / "gpu", encode=on_gpu(device))
    assert files_of(tmp_path / "gpu") == files_of(tmp_path / "cpu")


def test_trellises(device: str) -> None:
    """The same codes; whoever else searches does so within a block only."""
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(5))
    format = TrellisFormat(3, window=9, half=True)
    source = SimpleNamespace(read=lambda name: weight)
    expected = format.encode(lambda start, stop: weight[start:stop], (16, 32))
    got = on_gpu(device)(cast("CheckpointSource", source), "x", format)
    assert all(torch.equal(got.stored[part], expected.stored[part]) for part in expected.stored)
    asked: list[int] = []
    with searching_with(
        lambda format, tiles, factors: asked.append(len(tiles)) or tiles.new_zeros(len(tiles), 112).byte()
    ):
        assert not search(format, torch.ones(3, 256), 1).any()
    assert asked == [3]
    assert search(format, torch.ones(3, 256), 1).any()


def test_a_bad_weight_is_named(device: str, tmp_path: Path, write_model: Callable[..., Path]) -> None:
    from safetensors.torch import load_file, save_file

    folder = write_model(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name][3, 5] = torch.nan
    save_file(tensors, folder / "model.safetensors")
    with HFFolder(folder) as source, pytest.raises(KbitError, match=f"{name}: 1 weights are NaN or infinite"):
        convert(source, make_plan(source, QuantFormat.parse("nf4-b64")), tmp_path / "out", encode=on_gpu(device))


def test_the_command(tmp_path: Path, small_model: Path) -> None:
    command = ["quantize", str(small_model), "--method", "rtn", "-o", str(tmp_path / "out"), "--device"]
    with pytest.raises(UsageError, match="--device tpu: use cpu or cuda"):
        CliRunner().invoke(build([]), [*command, "tpu"], catch_exceptions=False)
    if not torch.cuda.is_available():
        with pytest.raises(UnsupportedError, match="no GPU"):
            CliRunner().invoke(build([]), [*command, "cuda"], catch_exceptions=False)
        assert not (tmp_path / "out").exists()
