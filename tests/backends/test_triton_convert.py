"""Converting a model with the GPU's kernels writes the bytes that the CPU writes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from threading import Lock
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest
import torch
from conversion_cases import files_of
from error_cases import edit_config, edit_tensors, run_command
from typer.testing import CliRunner

from kbit import _native
from kbit.checkpoint.readers.hf_folder import HFFolder
from kbit.cli.main import build
from kbit.formats.quant_format import QuantFormat
from kbit.formats.trellis import TrellisFormat
from kbit.formats.trellis_code import TileFactors, levels, search, searching_with
from kbit.host.errors import KbitError, UnsupportedError, UsageError
from kbit.quantizers.convert import convert, on_gpu
from kbit.quantizers.plan import make_plan

if TYPE_CHECKING:
    from kbit.checkpoint.source import CheckpointSource

pytest.importorskip("triton")

from kbit.kernels.triton.codecs import trellis_search

OTHER_LAYERS = re.compile(r"\.layers\.[1-9]")


@pytest.mark.parametrize("format", ["nf4-b64", "int3-b16-asym-dq", "quantile5-b32", "int8-row-fp32", "nf3-b32-o8"])
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


def one_layer_of_novels(data_dir: Path, folder: Path) -> Path:
    """The first layer of a real model, with its embedding and tokenizer."""
    model = data_dir / "models" / "novels-0.7m"
    if not model.exists():
        pytest.skip(f"{model} is not there")
    copytree(model, folder)
    edit_config(folder, num_hidden_layers=1)
    edit_tensors(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if OTHER_LAYERS.search(name)])
    return folder


def test_mixed_trellises(device: str, tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command with --device cuda writes what it writes with the CPU, some matrices at half widths. In the
    interpreter the GPU's search takes one tile of each half width that the model gets; the others are the CPU's.
    (Widths are weighed once: their costs are kept.)"""
    model = one_layer_of_novels(data_dir, tmp_path / "model")
    monkeypatch.setenv("KBIT_CALIBRATION", str(tmp_path / "calibration"))
    words = ["--method", "trellis", "--bits", "2.25", "--fast", "--calibration-tokens", "256", "--no-measure"]

    def quantized(device: str) -> dict[str, bytes]:
        out = tmp_path / device
        code, said, err = run_command(["quantize", str(model), *words, "--device", device, "-o", str(out)])
        assert code == 0, said + err
        return files_of(out)

    expected = quantized("cpu")
    config = json.loads(expected["config.json"])["quantization_config"]
    halves = {t["format"] for t in config["tensors"].values() if ".5" in t["format"]}
    assert halves
    searched: list[str] = []
    search_on_gpu = trellis_search.search_on_gpu
    in_turn = Lock()  # the interpreter has one grid at a time

    def in_part(
        format: TrellisFormat, tiles: torch.Tensor, place: str, factors: TileFactors | None = None
    ) -> torch.Tensor:
        assert place == "cuda"
        if device == "cuda":
            searched.append(str(format))
            return search_on_gpu(format, tiles, device, factors)
        rings = torch.empty(len(tiles), format.tile_bytes, dtype=torch.uint8)
        values = levels(format, torch.arange(1 << format.window)).float() * format.step
        passed_on = (None, None) if factors is None else (factors.columns.contiguous(), factors.rows.contiguous())
        context = _native.Context("", 1)
        _native.trellis_search(tiles.contiguous(), values, format.bits, rings, context, format.half, *passed_on)
        with in_turn:
            if factors is not None and format.half and str(format) not in searched:
                searched.append(str(format))
                rings[:1] = search_on_gpu(format, tiles[:1], device, factors[:1])
        return rings

    monkeypatch.setattr(trellis_search, "search_on_gpu", in_part)
    if device != "cuda":
        monkeypatch.setattr("kbit.backends.select.select_backend", lambda name: None)  # there is no GPU
    assert quantized("cuda") == expected
    assert halves <= set(searched)


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
