"""Formats that kbit does not read are named, with what to do about them."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from kbit.checkpoint.resolve import open_model
from kbit.host.errors import CheckpointError, KbitError, UnsupportedError

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0123456789abcdef" * 4 + b"\nsize 269060552\n"


def refused(path: Path, message: str, kind: type[KbitError]) -> None:
    with pytest.raises(kind, match=message) as caught:
        open_model(str(path))
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def saved(values: Any) -> bytes:
    data = io.BytesIO()
    torch.save(values, data)
    return data.getvalue()


def archive() -> bytes:
    data = io.BytesIO()
    np.savez(data, x=np.ones(3))
    return data.getvalue()


# Name and bytes of a file -> error, what is said of it.
FILES: dict[str, tuple[bytes, type[KbitError], str]] = {
    "pointer.gguf": (POINTER, CheckpointError, "is a git-lfs pointer and not the file itself: run git lfs pull"),
    "ggml-model-q4_0.bin": (b"tjgg\x03\0\0\0" + bytes(60), CheckpointError, "llama.cpp's GGJT format: use a GGUF file"),
    "older.bin": (b"lmgg" + bytes(60), CheckpointError, "llama.cpp's GGML format"),
    "lora.bin": (b"algg\x01\0\0\0" + bytes(60), CheckpointError, "a LoRA adapter of llama.cpp"),
    "page.gguf": (
        b"\n<!DOCTYPE html><html>Not found</html>",
        CheckpointError,
        "is a web page: the download went wrong",
    ),
    "missing.gguf": (b"Entry not found", CheckpointError, "the hub's answer that there is no such file"),
    "model.gguf.gz": (b"\x1f\x8b\x08\0" + bytes(60), CheckpointError, "is a gzip archive: unpack it first"),
    "model.tar": (bytes(257) + b"ustar" + bytes(300), CheckpointError, "is a tar archive: unpack it first"),
    "model.onnx": (
        b"\x08\x07\x12\x07pytorch" + bytes(60),
        UnsupportedError,
        "is an ONNX model, which kbit does not read",
    ),
    "tf_model.h5": (b"\x89HDF\r\n\x1a\n" + bytes(60), CheckpointError, "an HDF5 file of TensorFlow or Keras"),
    "flax_model.msgpack": (b"\x82\xa5" + bytes(60), UnsupportedError, "is Flax weights, which kbit does not read"),
    "weights.npz": (archive(), UnsupportedError, "is MLX or numpy arrays, which kbit does not read"),
    "pytorch_model.bin": (saved({"x": torch.ones(2)}), UnsupportedError, "looks like a pickle, .* with transformers"),
    "consolidated.00.pth": (saved({"x": torch.ones(2)}), UnsupportedError, "looks like a pickle"),
    "renamed.gguf": (saved({"x": torch.ones(2)}), UnsupportedError, "is a zip archive .torch.save writes such files."),
}


@pytest.mark.parametrize("name", FILES)
def test_files(tmp_path: Path, name: str) -> None:
    content, kind, message = FILES[name]
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, message, kind)


def weights_of(name: str, content: bytes) -> Callable[[Path], object]:
    def edit(model: Path) -> None:
        (model / "model.safetensors").unlink()
        (model / name).write_bytes(content)

    return edit


def config(**changes: Any) -> Callable[[Path], object]:
    def edit(model: Path) -> None:
        path = model / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def pointers(*names: str) -> Callable[[Path], object]:
    return lambda model: [(model / name).write_bytes(POINTER) for name in names]


def quanto(model: Path) -> None:
    (model / "quanto_qmap.json").write_text('{"x": {"weights": "qint8", "activations": "none"}}')
    save_file(
        {"x.weight._data": torch.ones(2, dtype=torch.int8), "x.weight._scale": torch.ones(2)},
        model / "model.safetensors",
    )


# What was done to a model's folder -> error, what is said of it.
FOLDERS: dict[str, tuple[Callable[[Path], object], type[KbitError], str]] = {
    "cloned without git-lfs": (
        pointers("model.safetensors", "tokenizer.json"),
        CheckpointError,
        "model.safetensors, tokenizer.json: git-lfs pointers and not the files themselves: run git lfs pull in this folder",
    ),
    "pickles that are pointers": (weights_of("pytorch_model.bin", POINTER), CheckpointError, "bin: git-lfs pointers"),
    "a configuration that is a pointer": (pointers("config.json"), CheckpointError, "config.json: git-lfs pointers"),
    "ONNX": (weights_of("model.onnx", b"\x08\x07"), UnsupportedError, "model.onnx is an ONNX model"),
    "TensorFlow": (weights_of("tf_model.h5", b"\x89HDF"), UnsupportedError, "tf_model.h5 is TensorFlow weights"),
    "Flax": (weights_of("flax_model.msgpack", b"\x82"), UnsupportedError, "flax_model.msgpack is Flax weights"),
    "old MLX": (weights_of("weights.npz", archive()), UnsupportedError, "weights.npz is MLX or numpy arrays"),
    "pickles": (
        weights_of("pytorch_model-00001-of-00002.bin", b"PK\x03\x04"),
        UnsupportedError,
        "only pickled weights .pytorch_model-00001-of-00002.bin.; loading them can run code: convert them to safetensors",
    ),
    "a trainer's leftovers": (
        weights_of("training_args.bin", b"PK"),
        CheckpointError,
        "no safetensors files in this folder",
    ),
    "GPTQ of plain weights": (
        config(quantization_config={"quant_method": "gptq", "bits": 4}),
        CheckpointError,
        "the weights should be packed by gptq, but none is; remove quantization_config from it if they are plain",
    ),
    "old GPTQ": (config(quantization_config={"bits": 4, "desc_act": False}), CheckpointError, "packed by gptq"),
    "old AWQ": (config(quantization_config={"zero_point": True, "q_group_size": 128}), CheckpointError, "by awq"),
    "EETQ": (config(quantization_config={"quant_method": "eetq"}), UnsupportedError, "by EETQ .'eetq'."),
    "EXL2": (config(quantization_config={"quant_method": "exl2", "bits": 3.0}), UnsupportedError, "by EXL2"),
    "quanto of no matrix": (quanto, UnsupportedError, "x.weight._data of shape .2,.: kbit reads packed matrices only"),
    "something new": (config(quantization_config={"quant_method": "q\x1bnew"}), UnsupportedError, r"by 'q\\x1bnew'"),
    "something without a name": (config(quantization_config={"wbits": 3}), UnsupportedError, "by 'an unnamed method'"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folders(tmp_path: Path, tiny_model: Path, name: str) -> None:
    edit, kind, message = FOLDERS[name]
    model = shutil.copytree(tiny_model, tmp_path / "model")
    edit(model)
    refused(model, message, kind)
    if kind is UnsupportedError and "quantized by" in message:
        refused(model, "which kbit does not read; use the original 16-bit checkpoint", kind)
