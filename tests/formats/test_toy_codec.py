"""A codec of a file of its own, and an entry in the registry: all that kbit needs to quantize, read, cut and run it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from toy_codec import NestedBits
from typer.testing import CliRunner

from kbit.backends.cpu.backend import NativeBackend
from kbit.backends.reference.backend import ReferenceBackend
from kbit.checkpoint.resolve import open_model
from kbit.cli.main import build
from kbit.formats.codec import Cut
from kbit.formats.quant_tensor import QuantTensor
from kbit.formats.registry import CODECS, parse_format
from kbit.host.errors import KbitError, UnsupportedError, UsageError
from kbit.models.load import load_decoder
from kbit.models.shard import shard

SHAPE = (12, 44)


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CODECS, NestedBits.family, NestedBits)
        yield


@pytest.fixture(scope="module")
def weights() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as `kbit quantize --format bitwise5` leaves it, head and embedding at 8 bits."""
    out = tmp_path_factory.mktemp("toy") / "bitwise"
    arguments = ["quantize", str(tiny_model), "--format", "bitwise5", "--embedding-bits", "8", "-o", str(out)]
    result = CliRunner().invoke(build([]), arguments)
    assert result.exit_code == 0, result.output
    return out


def encode(x: torch.Tensor, bits: int) -> QuantTensor:
    return NestedBits(bits).encode(lambda start, stop: x[start:stop], (x.shape[0], x.shape[1]))


def test_the_registry_reads_its_strings_and_leaves_the_others_theirs() -> None:
    assert parse_format("bitwise3") == NestedBits(3)
    assert str(parse_format("nf4-b64")) == "nf4-b64"
    with pytest.raises(UsageError, match=r"'bitwise9' is not a format: write bitwise2 to bitwise8"):
        parse_format("bitwise9")
    with pytest.raises(UsageError, match="data type 'netsed' is unknown"):
        parse_format("netsed4")


def test_one_store_serves_several_widths(weights: torch.Tensor) -> None:
    """Fewer bits read: fewer bytes, and the values of the narrower format."""
    whole = encode(weights, 8)
    assert whole.format.widths == (8, 7, 6, 5, 4, 3, 2)
    assert whole.format.nbytes(*SHAPE) == whole.nbytes == SHAPE[0] * (8 * 6 + 4)
    for width in whole.format.widths:
        assert whole.format.nbytes(*SHAPE, width) == NestedBits(width).nbytes(*SHAPE)
        assert torch.equal(whole.dequantize(width=width), encode(weights, width).dequantize())
        assert (whole.dequantize(width=width) - weights).abs().max() <= weights.abs().max() / 2 ** (width - 1)
    with pytest.raises(UsageError, match="bitwise8 serves 8, 7, 6, 5, 4, 3, 2 bits, not 9"):
        whole.dequantize(width=9)


def test_a_codec_of_one_width_serves_no_other(weights: torch.Tensor) -> None:
    format = parse_format("int4-b16")
    assert format.nbytes(*SHAPE, 4) == format.nbytes(*SHAPE)
    with pytest.raises(UsageError, match="int4-b16 serves 4 bits, not 3"):
        format.encode(lambda start, stop: weights[start:stop], SHAPE).dequantize(width=3)


def test_parts_have_the_values_of_the_whole(weights: torch.Tensor) -> None:
    whole = encode(weights, 3)
    for cut in (Cut(0, 0, 5), Cut(0, 5, 12), Cut(1, 0, 16), Cut(1, 16, 44)):
        part = whole.cut(cut)
        assert torch.equal(part.dequantize(), cut.of(whole.dequantize()))
    with pytest.raises(UnsupportedError, match=r"^o: columns 0 to 12 of 44 are no whole blocks of 8 \(bitwise3\)"):
        whole.cut(Cut(1, 0, 12), "o")


def test_a_folder_holds_it_and_reads_it_back(folder: Path, tiny_model: Path) -> None:
    with open_model(str(folder)) as source, open_model(str(tiny_model)) as original:
        stored_as = {name: info.stored_as for name, info in source.tensors.items()}
        assert {"bitwise5", "bitwise8", "F16"} == set(stored_as.values())
        for name, text in stored_as.items():
            weight = source.read_weight(name)
            if text == "F16":
                assert torch.equal(source.read(name), original.read(name))
                continue
            assert isinstance(weight, QuantTensor)
            expected = encode(original.read(name), int(text[-1]))
            assert all(torch.equal(weight.stored[part], expected.stored[part]) for part in expected.stored)
            assert torch.equal(weight.dequantize(), expected.dequantize())
            assert source.tensors[name].nbytes == expected.nbytes


def test_info_and_the_manifest_know_it(folder: Path) -> None:
    result = CliRunner().invoke(build([]), ["info", str(folder), "--json"])
    assert result.exit_code == 0, result.output
    assert "bitwise5" in result.output
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (config["format"], config["bits"], config["codebooks"]) == ("bitwise5", 5, {})


def test_the_reference_runs_it(folder: Path) -> None:
    """Expanded and packed alike, and as the decoded weights say."""
    prompt = torch.arange(1, 9)[None]
    with open_model(str(folder)) as source:
        lean = load_decoder(source, ReferenceBackend(expand=False))
        expanded = load_decoder(source, ReferenceBackend())
        found, again = (model.forward(prompt, model.new_cache(1, 16)) for model in (lean, expanded))
    assert bool(torch.isfinite(found).all())
    torch.testing.assert_close(found, again, rtol=1e-5, atol=1e-5)


def test_one_of_two_processes_gets_its_share(folder: Path) -> None:
    with open_model(str(folder)) as source:
        halves = [shard(source, rank, 2) for rank in range(2)]
        for name, dim in (("model.layers.0.self_attn.q_proj.weight", 0), ("model.layers.0.mlp.down_proj.weight", 1)):
            parts = [half.read_weight(name) for half in halves]
            assert all(isinstance(part, QuantTensor) for part in parts)
            values = torch.cat([part.dequantize() for part in parts], dim=dim)  # type: ignore[union-attr]
            assert torch.equal(values, source.read(name))


def test_backends_without_its_kernels_refuse_it_by_name(folder: Path, weights: torch.Tensor) -> None:
    message = (
        "the {} backend has no kernel for bitwise{}: its kernels read planes.*, not bitwise; use --backend reference"
    )
    with open_model(str(folder)) as source, pytest.raises(UnsupportedError, match=message.format("native", "8")):
        load_decoder(source, NativeBackend(1))
    pytest.importorskip("triton")
    from kbit.kernels.triton.codecs.layout import prepare_weight

    with pytest.raises(UnsupportedError, match=message.format("triton", "4", "planes")):
        prepare_weight(encode(weights, 4), "cpu")


def test_a_command_refuses_it_by_name(folder: Path) -> None:
    result = CliRunner().invoke(build([]), ["run", "once", "--model", str(folder), "--max-tokens", "1"])
    assert isinstance(result.exception, (KbitError, SystemExit))
    assert "no kernel for bitwise8" in result.output + str(result.exception)


def test_a_damaged_part_is_named(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"]["tensors"]["model.layers.0.mlp.down_proj.weight"]["format"] = "bitwise6"
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(KbitError, match=r"config\.json: changed since it was written"):
        open_model(str(copy))
