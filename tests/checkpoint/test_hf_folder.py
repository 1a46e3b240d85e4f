"""Hugging Face folders: which files count, what is refused, fingerprints."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kbit.checkpoint.readers.hf_folder import INDEX_NAME, HFFolder
from kbit.host.errors import CheckpointError, KbitError, UnsupportedError
from kbit.host.notes import KbitNote


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a config and nothing else."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "llama"}')
    return path


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_single_file(tmp_path: Path, write_model: Callable[..., Path], dtype: torch.dtype) -> None:
    path = write_model(tmp_path / "m", dtype=dtype)
    expected = load_file(path / "model.safetensors")
    with HFFolder(path) as source:
        assert source.tensors.keys() == expected.keys()
        for name, tensor in expected.items():
            info = source.tensors[name]
            assert (info.shape, info.nbytes) == (tuple(tensor.shape), tensor.numel() * tensor.element_size())
            assert info.file == path / "model.safetensors"
            read = source.read(name)
            assert read.dtype == torch.float32
            assert torch.equal(read, tensor.float())
            weight = source.read_weight(name)
            assert isinstance(weight, torch.Tensor)
            assert torch.equal(weight, read)
            assert torch.equal(source.read_rows(name, 1, 3), tensor.float()[1:3])
    with pytest.raises(CheckpointError):
        source.read("model.norm.weight")


def test_sharded_equals_single(tmp_path: Path, write_model: Callable[..., Path]) -> None:
    with HFFolder(write_model(tmp_path / "one")) as one, HFFolder(write_model(tmp_path / "three", shards=3)) as three:
        assert set(one.tensors) == set(three.tensors)
        assert {info.file.name for info in three.tensors.values()} == {
            f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)
        }
        for name in one.tensors:
            assert torch.equal(one.read(name), three.read(name))


def test_a_file_of_any_name_if_it_is_the_only_one(folder: Path) -> None:
    save_file({"x": torch.ones(2)}, folder / "weights.safetensors")
    with HFFolder(folder) as source:
        assert source.read("x").tolist() == [1, 1]


def test_model_safetensors_wins_over_others(folder: Path) -> None:
    save_file({"x": torch.ones(2)}, folder / "model.safetensors")
    save_file({"x": torch.zeros(2)}, folder / "consolidated.safetensors")
    with HFFolder(folder) as source:
        assert source.read("x").tolist() == [1, 1]


def test_sidecar_files_are_the_known_ones(tmp_path: Path, write_model: Callable[..., Path]) -> None:
    path = write_model(tmp_path / "m")
    (path / "chat_template.jinja").write_text("{{ messages }}")
    more = {
        "chat_template.json",
        "tokenizer.model",
        "spiece.model",
        "sentencepiece.bpe.model",
        "generation_config.json",
    }
    for name in more:
        (path / name).write_text("{}")
    (path / "README.md").write_text("not ours to copy")
    (path / "modeling_x.py").write_text("raise SystemExit")
    (path / "vocab.json").mkdir()  # a folder of that name is no file
    with HFFolder(path) as source:
        assert set(source.sidecar_files()) == {"tokenizer.json", "chat_template.jinja", *more}


def test_opening_imports_no_torch(tiny_model: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from kbit.checkpoint.resolve import open_model\n"
        "source = open_model(sys.argv[1]); source.tensors; source.sidecar_files(); source.fingerprint()\n"
        "print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tiny_model)], capture_output=True, text=True, check=True, timeout=300
    )
    assert result.stdout.split() == ["False", "False"]


def test_integer_tensors_cannot_be_weights(folder: Path) -> None:
    save_file({"x": torch.ones(2, dtype=torch.int32)}, folder / "model.safetensors")
    with HFFolder(folder) as source, pytest.raises(UnsupportedError, match="x is I32, but weights must be floating"):
        source.read("x")


# --- what is refused -------------------------------------------------------------------------------------------------


def refused(folder: Path, *fragments: str, kind: type[KbitError] = CheckpointError) -> None:
    with pytest.raises(kind) as caught:
        HFFolder(folder)
    text = str(caught.value)
    assert "\n" not in text
    for fragment in (str(folder), *fragments):
        assert fragment in text


def test_not_a_folder(tmp_path: Path) -> None:
    refused(tmp_path / "missing", "not a folder")


def test_no_config(tmp_path: Path) -> None:
    refused(tmp_path, "no config.json")


def test_lora_adapter(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file({"x": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    refused(tmp_path, "no config.json", "LoRA adapter: merge it into its base model")


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"a": 1} x', "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 200_000, "not valid JSON"),
        (b'{"vocab_size": ' + b"1" * 5000 + b"}", "not valid JSON"),
        (b"[]", "holds a JSON list"),
        (b'"x"', "holds a JSON str"),
        (b"null", "holds a JSON NoneType"),
    ],
)
def test_corrupt_config(folder: Path, content: bytes, fragment: str) -> None:
    (folder / "config.json").write_bytes(content)
    refused(folder, "config.json", fragment)


def test_an_endless_config_is_not_read(folder: Path) -> None:
    with (folder / "config.json").open("wb") as file:
        file.truncate(1 << 40)  # sparse
    refused(folder, "config.json", "too large for a JSON file")


def test_an_endless_tokenizer_is_not_read(folder: Path) -> None:
    save_file({"x": torch.ones(2)}, folder / "model.safetensors")
    with (folder / "tokenizer.json").open("wb") as file:
        file.truncate(1 << 40)
    with HFFolder(folder) as source, pytest.raises(CheckpointError, match=r"tokenizer\.json: .* too large"):
        source.sidecar_files()


def test_no_weights(folder: Path) -> None:
    refused(folder, "no safetensors files")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "weights.pkl"])
def test_pickles(folder: Path, name: str) -> None:
    torch.save({"x": torch.ones(2)}, folder / name)
    refused(folder, name, "pickle", "convert them to safetensors", kind=UnsupportedError)


def test_several_files_without_an_index(folder: Path) -> None:
    for name in ("a", "b"):
        save_file({name: torch.ones(2)}, folder / f"{name}.safetensors")
    refused(folder, "2 safetensors files but no model.safetensors.index.json")


def test_missing_shard(tmp_path: Path, write_model: Callable[..., Path]) -> None:
    path = write_model(tmp_path / "m", shards=2)
    (path / "model-00002-of-00002.safetensors").unlink()
    refused(path, "model-00002-of-00002.safetensors", "missing", "download it again")


def test_a_shard_that_is_a_folder(tmp_path: Path, write_model: Callable[..., Path]) -> None:
    path = write_model(tmp_path / "m", shards=2)
    (path / "model-00002-of-00002.safetensors").unlink()
    (path / "model-00002-of-00002.safetensors").mkdir()
    refused(path, "model-00002-of-00002.safetensors", "missing")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_does_not_hang(folder: Path) -> None:
    os.mkfifo(folder / "model.safetensors")
    refused(folder, "model.safetensors", "missing")


def test_truncated_shard(tmp_path: Path, write_model: Callable[..., Path]) -> None:
    path = write_model(tmp_path / "m", shards=2)
    shard = path / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-5])
    refused(path, shard.name, "truncated")


def test_missing_tensor(tmp_path: Path, write_model: Callable[..., Path]) -> None:
    path = write_model(tmp_path / "m", shards=2)
    index = json.loads((path / INDEX_NAME).read_text())
    index["weight_map"]["model.extra.weight"] = "model-00001-of-00002.safetensors"
    (path / INDEX_NAME).write_text(json.dumps(index))
    refused(path, "model-00001-of-00002.safetensors", "model.extra.weight is missing")


@pytest.mark.parametrize(
    "shard",
    [
        "../x.safetensors",
        "sub/x.safetensors",
        "/etc/passwd",
        ".",
        "..",
        "",
        "x/",
        "./x.safetensors",
        3,
        None,
        ["x"],
        {},
    ],
    ids=repr,
)
def test_index_points_outside(folder: Path, shard: Any) -> None:
    save_file({"x": torch.ones(2)}, folder.parent / "x.safetensors")
    (folder / "sub").mkdir()
    save_file({"x": torch.ones(2)}, folder / "sub" / "x.safetensors")
    save_file({"x": torch.ones(2)}, folder / "x.safetensors")
    write_index(folder, {"x": shard})
    with pytest.raises(CheckpointError, match="not a plain file name|shard is missing"):
        HFFolder(folder)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": 1}', "[]", "{"])
def test_corrupt_index(folder: Path, content: str) -> None:
    save_file({"x": torch.ones(2)}, folder / "model-00001-of-00002.safetensors")
    (folder / INDEX_NAME).write_text(content)
    refused(folder, INDEX_NAME)
    save_file({"x": torch.ones(2)}, folder / "model.safetensors")
    with pytest.warns(KbitNote, match=f"{INDEX_NAME}.*; model.safetensors is used"):
        HFFolder(folder).close()


@pytest.mark.parametrize(
    "section",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "compressed-tensors"},
        {"quant_method": ["fp8"]},
        {"bits": 4, "group_size": 64},
    ],
    ids=str,
)
def test_other_quantizers_are_refused(folder: Path, section: dict[str, Any]) -> None:
    save_file({"x": torch.ones(2)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": section}))
    refused(folder, "already quantized by", "16-bit checkpoint", kind=UnsupportedError)


@pytest.mark.parametrize("section", ["fp8", "kbit", 3, [], True], ids=repr)
def test_senseless_quantization_config(folder: Path, section: Any) -> None:
    save_file({"x": torch.ones(2)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": section}))
    refused(folder, "quantization_config", "is not an object")


@pytest.mark.parametrize("size", [[0, 128], [128], [128.0, 128], "128", [True, 128], [-1, 1]], ids=repr)
def test_senseless_fp8_block_size(folder: Path, size: Any) -> None:
    save_file({"x": torch.ones(2)}, folder / "model.safetensors")
    section = {"quant_method": "fp8", "weight_block_size": size}
    (folder / "config.json").write_text(json.dumps({"quantization_config": section}))
    refused(folder, "weight_block_size")


def test_a_refused_folder_is_closed(tmp_path: Path, write_model: Callable[..., Path]) -> None:
    path = write_model(tmp_path / "m", shards=2)
    (path / "model-00002-of-00002.safetensors").unlink()
    descriptors = Path("/proc/self/fd")
    if not descriptors.is_dir():
        pytest.skip("no /proc to count open files in")
    before = len(list(descriptors.iterdir()))
    refused(path)
    assert len(list(descriptors.iterdir())) == before


def test_no_permission(tmp_path: Path, write_model: Callable[..., Path]) -> None:
    path = write_model(tmp_path / "m")
    (path / "model.safetensors").chmod(0)
    if os.access(path / "model.safetensors", os.R_OK):
        pytest.skip("permissions do not bind this user")
    refused(path, "model.safetensors", "cannot be opened")


def test_fingerprint_changes_with_any_file(tmp_path: Path, write_model: Callable[..., Path]) -> None:
    path = write_model(tmp_path / "m", shards=2)

    def fingerprint(where: Path = path) -> str:
        with HFFolder(where) as source:
            return source.fingerprint()

    first = fingerprint()
    assert fingerprint() == first
    seen = {first}
    for file in sorted(path.iterdir()):
        if file.name == INDEX_NAME:
            continue  # counts through the tensors it names
        status = file.stat()
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000))
        seen.add(fingerprint())
    assert len(seen) == 1 + len(list(path.iterdir())) - 1
    before = fingerprint()
    (path / "generation_config.json").write_text("{}")
    assert fingerprint() != before
    shutil.copytree(path, tmp_path / "copy", copy_function=shutil.copy2)
    assert fingerprint(tmp_path / "copy") == fingerprint()  # wherever it lies
