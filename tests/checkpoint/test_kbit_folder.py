"""Folders kbit wrote: every flipped byte is noticed and named, and nothing in them is believed."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kbit.checkpoint.readers.hf_folder import INDEX_NAME
from kbit.checkpoint.readers.kbit_folder import MANIFEST_NAME, KbitFolder
from kbit.checkpoint.resolve import open_model
from kbit.formats.quant_format import QuantFormat
from kbit.formats.quant_tensor import QuantTensor
from kbit.host.errors import CheckpointError, KbitError, UnsupportedError
from kbit.quantizers.convert import convert
from kbit.quantizers.plan import make_plan

Content = dict[str, list[bytes]]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The tiny model in several formats and two files."""
    out = tmp_path_factory.mktemp("kbit") / "out"
    overrides = [("*q_proj.weight", "quantile3-b32"), ("*down_proj.weight", "int4-b64-asym-dq")]
    overrides += [("*1*up_proj.weight", "lloyd2-row")]
    with open_model(str(tiny_model)) as source:
        plan = make_plan(source, QuantFormat.parse("nf3-b64"), overrides=overrides, shard_bytes=25_000)
        convert(source, plan, out)
    assert len(list(out.glob("*.safetensors"))) == 2
    return out


@pytest.fixture
def folder(tmp_path: Path, written: Path) -> Path:
    """A copy of it to damage."""
    return Path(shutil.copytree(written, tmp_path / "out"))


def read_all(path: Path) -> Content:
    """Everything a folder gives, as bytes."""
    with open_model(str(path)) as source:
        assert isinstance(source, KbitFolder)
        content: Content = {f"sidecar {name}": [data] for name, data in source.sidecar_files().items()}
        content["config"] = [json.dumps(source.config).encode()]
        for name in source.tensors:
            weight = source.read_weight(name)
            parts = [*weight.stored.values(), weight.codebook] if isinstance(weight, QuantTensor) else [weight]
            content[name] = [part.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for part in parts]
        return content


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Change config.json and its checksum: what an attacker would do, not a bad disk."""
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    data = json.dumps(config).encode()
    (folder / "config.json").write_bytes(data)
    edit_manifest(folder, lambda m: m["files"].update({"config.json": hashlib.sha256(data).hexdigest()}))


def edit_manifest(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    edit(manifest)
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))


def section(config: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = config["quantization_config"]
    return result


def refused(folder: Path, *fragments: str, kind: type[KbitError] = CheckpointError) -> None:
    with pytest.raises(kind) as caught:
        read_all(folder)
    text = str(caught.value)
    assert "\n" not in text
    for fragment in (str(folder), *fragments):
        assert fragment in text


# --- reading ---------------------------------------------------------------------------------------------------------


def test_weights_and_rows_agree(written: Path) -> None:
    with open_model(str(written)) as source:
        for name, info in source.tensors.items():
            whole = source.read(name)
            assert whole.dtype == torch.float32
            assert tuple(whole.shape) == info.shape
            weight = source.read_weight(name)
            assert torch.equal(weight.dequantize() if isinstance(weight, QuantTensor) else weight, whole)
            assert torch.equal(source.read_rows(name, 1, 5), whole[1:5])


def test_tensors_are_listed_by_weight_with_everything_counted(written: Path) -> None:
    with open_model(str(written)) as source:
        info = source.tensors["model.layers.0.self_attn.q_proj.weight"]
        assert (info.shape, info.stored_as) == ((32, 32), "quantile3-b32")
        assert info.nbytes == 32 * 32 * 3 // 8 + 2 * 32 + 4 * 8  # codes, scales, codebook
        assert source.tensors["model.norm.weight"].stored_as == "F16"


# --- damage ----------------------------------------------------------------------------------------------------------


def test_any_flipped_byte_of_any_tensor_is_noticed_and_named(folder: Path) -> None:
    for shard in sorted(folder.glob("*.safetensors")):
        original = shard.read_bytes()
        length = int.from_bytes(original[:8], "little")
        header = json.loads(original[8 : 8 + length])
        generator = random.Random(0)
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            for position in {begin, end - 1, generator.randrange(begin, end)}:
                damaged = bytearray(original)
                damaged[8 + length + position] ^= 1 << generator.randrange(8)
                shard.write_bytes(damaged)
                with pytest.raises(CheckpointError) as caught:
                    read_all(folder)
                assert f"{shard}: {name} is damaged (sha256 differs)" in str(caught.value)
        shard.write_bytes(original)
    read_all(folder)


@pytest.mark.parametrize(
    ("pattern", "samples"), [("*.safetensors", 250), ("config.json", 150), (MANIFEST_NAME, 150), (INDEX_NAME, 100)]
)
def test_a_flipped_byte_of_a_header_is_noticed_or_harmless(
    folder: Path, written: Path, pattern: str, samples: int
) -> None:
    """Either an error that names the file, a tensor in it or the folder; or every byte read is as it was."""
    expected = read_all(written)
    generator = random.Random(pattern)
    noticed = 0
    for path in sorted(folder.glob(pattern)):
        original = path.read_bytes()
        length = 8 + int.from_bytes(original[:8], "little") if path.suffix == ".safetensors" else len(original)
        for position in generator.sample(range(length), min(samples, length)):
            damaged = bytearray(original)
            damaged[position] ^= 1 << generator.randrange(8)
            path.write_bytes(damaged)
            try:
                assert read_all(folder) == expected
            except KbitError as error:
                assert str(folder) in str(error)
                assert "\n" not in str(error)
                noticed += 1
        path.write_bytes(original)
    assert noticed > samples // 2


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_changed_file_is_named(folder: Path, name: str) -> None:
    with (folder / name).open("a") as file:
        file.write(" ")
    refused(folder, name, "changed since it was written", "copy the folder again")


def test_a_file_that_came_later_is_tolerated(folder: Path) -> None:
    """A chat template put into the folder by hand is no damage."""
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert read_all(folder)["sidecar chat_template.jinja"] == [b"{{ messages }}"]


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", INDEX_NAME, "model-00001-of-00002.safetensors"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    refused(folder, *([] if name == INDEX_NAME else [name]))


def test_missing_manifest(folder: Path) -> None:
    (folder / MANIFEST_NAME).unlink()
    refused(folder, MANIFEST_NAME, "incomplete copy; copy it again")


# --- lies ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [2, "1", None, 0, 1.5])
def test_newer_layout(folder: Path, version: Any) -> None:
    edit_config(folder, lambda c: section(c).update(version=version))
    refused(folder, "config.json", "layout version", "update kbit", kind=UnsupportedError)


@pytest.mark.parametrize("version", [2, None, "x" * 1000])
def test_newer_manifest(folder: Path, version: Any) -> None:
    edit_manifest(folder, lambda m: m.update(version=version))
    refused(folder, MANIFEST_NAME, "update kbit", kind=UnsupportedError)


Q = "model.layers.0.self_attn.q_proj.weight"
CONFIG_LIES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no tensors": (lambda s: s.pop("tensors"), "lacks its tensors"),
    "tensors are a list": (lambda s: s.update(tensors=[]), "lacks its tensors"),
    "codebooks are a list": (lambda s: s.update(codebooks=[1]), "lacks its tensors or codebooks"),
    "entry without format": (lambda s: s["tensors"][Q].pop("format"), f"{Q}: bad entry"),
    "entry without shape": (lambda s: s["tensors"][Q].pop("shape"), f"{Q}: bad entry"),
    "entry is a string": (lambda s: s["tensors"].update({Q: "nf4-b64"}), f"{Q}: bad entry"),
    "entry is null": (lambda s: s["tensors"].update({Q: None}), f"{Q}: bad entry"),
    "format is a number": (lambda s: s["tensors"][Q].update(format=4), f"{Q}: bad entry"),
    "format is a list": (lambda s: s["tensors"][Q].update(format=["nf4"]), f"{Q}: bad entry"),
    "unknown format": (lambda s: s["tensors"][Q].update(format="gptq4-b64"), f"{Q}: bad entry"),
    "endless format": (lambda s: s["tensors"][Q].update(format="n" * 100_000), f"{Q}: bad entry"),
    "another format": (lambda s: s["tensors"][Q].update(format="int4-b32"), f"{Q}.plane4 is missing"),
    "another block size": (lambda s: s["tensors"][Q].update(format="quantile3-b16"), f"{Q}.scales is F16 (32, 1)"),
    "another scale type": (lambda s: s["tensors"][Q].update(format="quantile3-b32-bf16"), f"{Q}.scales is F16"),
    "another shape": (lambda s: s["tensors"][Q].update(shape=[32, 64]), f"{Q}.plane2 is U8 (32, 8)"),
    "shape of one": (lambda s: s["tensors"][Q].update(shape=[1024]), "impossible shape"),
    "negative shape": (lambda s: s["tensors"][Q].update(shape=[-32, -32]), "impossible shape"),
    "float shape": (lambda s: s["tensors"][Q].update(shape=[32.0, 32]), "impossible shape"),
    "huge shape": (lambda s: s["tensors"][Q].update(shape=[10**30, 10**30]), f"{Q}.plane2 is U8 (32, 8)"),
    "shape is a number": (lambda s: s["tensors"][Q].update(shape=3), f"{Q}: bad entry"),
    "a tensor that is not there": (
        lambda s: s["tensors"].update({"ghost.weight": {"format": "nf4-b64", "shape": [2, 2]}}),
        "ghost.weight.plane4 is missing",
    ),
    "a weight that is not listed": (lambda s: s["tensors"].pop(Q), f"{Q}."),
    "codebook too short": (lambda s: s["codebooks"]["nf3-b64"].pop(), "no codebook of 8 values for nf3-b64"),
    "codebook too long": (lambda s: s["codebooks"]["nf3-b64"].append(0.5), "no codebook of 8 values for nf3-b64"),
    "codebook missing": (lambda s: s["codebooks"].pop("nf3-b64"), "no codebook of 8 values for nf3-b64"),
    "codebook of another row length": (
        lambda s: s["codebooks"].update({"lloyd2-row@33": s["codebooks"].pop("lloyd2-row@32")}),
        "no codebook of 4 values for lloyd2-row",
    ),
    "codebook of text": (lambda s: s["codebooks"].update({"nf3-b64": ["x"] * 8}), "'nf3-b64' is not a list of finite"),
    "codebook is a number": (lambda s: s["codebooks"].update({"nf3-b64": 3}), "'nf3-b64' is not a list of finite"),
    "codebook with NaN": (lambda s: s["codebooks"]["nf3-b64"].__setitem__(0, float("nan")), "list of finite numbers"),
    "codebook with infinity": (lambda s: s["codebooks"]["nf3-b64"].__setitem__(0, float("inf")), "list of finite"),
    "codebook beyond float32": (lambda s: s["codebooks"]["nf3-b64"].__setitem__(0, 1e39), "list of finite numbers"),
    "codebook beyond float64": (lambda s: s["codebooks"]["nf3-b64"].__setitem__(0, 10**400), "list of finite numbers"),
}


@pytest.mark.parametrize("lie", CONFIG_LIES)
def test_a_config_that_lies(folder: Path, lie: str) -> None:
    edit, message = CONFIG_LIES[lie]
    edit_config(folder, lambda config: edit(section(config)))
    with pytest.raises(CheckpointError) as caught:
        read_all(folder)
    assert message in str(caught.value)
    assert str(folder) in str(caught.value)
    assert len(str(caught.value)) < 500 + len(str(folder))


MANIFEST_LIES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no tensors": (lambda m: m.pop("tensors"), "lacks its tensors or files"),
    "no files": (lambda m: m.pop("files"), "lacks its tensors or files"),
    "files are a list": (lambda m: m.update(files=["config.json"]), "lacks its tensors or files"),
    "config.json not listed": (lambda m: m["files"].pop("config.json"), "no checksum of config.json"),
    "a tensor is not listed": (lambda m: m["tensors"].pop(f"{Q}.scales"), f"{Q}.scales is in the weight files only"),
    "a tensor too many": (lambda m: m["tensors"].update(ghost="00"), "ghost is in the manifest only"),
    "a digest is a number": (lambda m: m["tensors"].update({f"{Q}.scales": 7}), f"{Q}.scales is damaged"),
    "a file too many": (lambda m: m["files"].update(ghost="00"), "ghost: missing, though the manifest lists it"),
    "a file outside": (lambda m: m["files"].update({"../config.json": "00"}), "missing, though the manifest lists it"),
}


@pytest.mark.parametrize("lie", MANIFEST_LIES)
def test_a_manifest_that_lies(folder: Path, lie: str) -> None:
    edit, message = MANIFEST_LIES[lie]
    (folder.parent / "config.json").write_text("{}")
    edit_manifest(folder, edit)
    refused(folder, message)


def test_a_kept_tensor_of_another_type_is_not_believed(folder: Path) -> None:
    """One bit turns F32 into I32 in a header; the bytes, and so the checksum, stay right."""
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        if "model.norm.weight" in tensors:
            tensors["model.norm.weight"] = tensors["model.norm.weight"].view(torch.int16)
            save_file(tensors, shard, metadata={"format": "pt"})
    refused(folder, "model.norm.weight is I16", "copy the file again")


def test_numbers_that_are_not_finite_are_refused_even_with_a_fitting_checksum(folder: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight.scales"
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        if name in tensors:
            tensors[name][0, 0] = float("nan")
            save_file(tensors, shard, metadata={"format": "pt"})
            digest = hashlib.sha256(tensors[name].view(torch.uint8).numpy().tobytes()).hexdigest()
            manifest = json.loads((folder / MANIFEST_NAME).read_text())
            manifest["tensors"][name] = digest
            (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"up_proj\.weight\.scales holds NaN or infinity"):
        read_all(folder)
