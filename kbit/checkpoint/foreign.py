"""Files and folders in formats that kbit does not read: what they are, and what to do about it.

Recognised by their first bytes, their names or their configuration, so that an error names the format instead of what
happens to be missing from it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

from kbit.checkpoint.source import TensorInfo
from kbit.checkpoint.surplus import harmless
from kbit.host.errors import CheckpointError, UnsupportedError, one_line
from kbit.host.files import read_json_object

PICKLE_ENDINGS = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
# Pointers take about 130 bytes, and no more than this by git-lfs' specification.
_POINTER_BYTES = 1024

_ORIGINAL = "use the original 16-bit checkpoint"
_OTHER = "use the model's safetensors or GGUF files"
_PACKED = "unpack it first"
_OLD_GGML = "use a GGUF file of the model (llama.cpp has not read this format since 2023)"
# First bytes -> what it is, what to do.
_STARTS: tuple[tuple[bytes, str, str], ...] = (
    (LFS_POINTER, "a git-lfs pointer and not the file itself", "run git lfs pull in its folder, or download it again"),
    (b"lmgg", "a file in llama.cpp's GGML format", _OLD_GGML),
    (b"fmgg", "a file in llama.cpp's GGMF format", _OLD_GGML),
    (b"tjgg", "a file in llama.cpp's GGJT format", _OLD_GGML),
    (b"algg", "a LoRA adapter of llama.cpp", "use a GGUF file of the merged model"),
    (b"\x89HDF\r\n", "an HDF5 file of TensorFlow or Keras", _OTHER),
    (b"<!DOCTYPE", "a web page: the download went wrong", "download it again"),
    (b"<!doctype", "a web page: the download went wrong", "download it again"),
    (b"<html", "a web page: the download went wrong", "download it again"),
    (b"Entry not found", "the hub's answer that there is no such file", "check its name and download it again"),
    (b"\x1f\x8b", "a gzip archive", _PACKED),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", _PACKED),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _PACKED),
    (b"Rar!", "a RAR archive", _PACKED),
    (b"\xfd7zXZ", "an xz archive", _PACKED),
)
# Endings of files -> what they hold.
_ENDINGS = {
    ".onnx": "an ONNX model",
    ".h5": "TensorFlow weights",
    ".msgpack": "Flax weights",
    ".npz": "MLX or numpy arrays",
    ".tflite": "a TensorFlow Lite model",
    ".pte": "an ExecuTorch program",
    ".mlpackage": "a Core ML model",
    ".llamafile": "a llamafile",
    ".engine": "a TensorRT engine",
}
# quant_method of config.json -> what people call it.
_METHODS = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors (llm-compressor)",
    "exl2": "EXL2",
    "exl3": "EXL3",
    "hqq": "HQQ",
    "quanto": "optimum-quanto",
    "torchao": "torchao",
    "aqlm": "AQLM",
    "vptq": "VPTQ",
    "quip": "QuIP#",
    "spqr": "SpQR",
    "higgs": "HIGGS",
    "eetq": "EETQ",
    "fbgemm_fp8": "FBGEMM fp8",
    "modelopt": "NVIDIA ModelOpt",
    "auto-round": "AutoRound",
    "intel/auto-round": "AutoRound",
    "mxfp4": "MXFP4",
    "bitnet": "BitNet",
    "mlx": "MLX",
}
_BITSANDBYTES = ("load_in_", "_load_in_", "bnb_")
PLAIN = ("F64", "F32", "F16", "BF16")
_COMPANIONS = re.compile(
    r"(^|\.)(qweight|qzeros|scales|g_idx|absmax|quant_map|quant_state\..*|SCB|W_q|weight_scale.*|trellis|s[uv]h?"
    r"|mcg|mul1)$"
)
# Files beside config.json in which older tools of these methods keep what is now in config.json.
_METHOD_FILES = {
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "hf_quant_config.json": "modelopt",
    "quanto_qmap.json": "quanto",  # as QuantizedModelForCausalLM names it
    "quantization_map.json": "quanto",  # as its manual does
}


def refuse_file(path: Path, start: bytes) -> None:
    """Raise if a file is in a known format that kbit does not read.

    Args:
        path: the file, for its name.
        start: its first bytes, 64 at least where it has them.

    Raises:
        CheckpointError: it is something else than the file it should be.
        UnsupportedError: it is a model in another format.
    """
    head = start.lstrip(b"\xef\xbb\xbf \r\n\t")
    for magic, what, remedy in _STARTS:
        if head.startswith(magic):
            raise CheckpointError(f"{path}: is {what}: {remedy}")
    if start[257:262] == b"ustar":
        raise CheckpointError(f"{path}: is a tar archive: {_PACKED}")
    if path.suffix in _ENDINGS:
        raise UnsupportedError(f"{path}: is {_ENDINGS[path.suffix]}, which kbit does not read: {_OTHER}")
    if path.suffix in PICKLE_ENDINGS:
        raise UnsupportedError(
            f"{path}: looks like a pickle, and loading those can run code: {convert_pickle(path.parent)}"
        )
    if start.startswith(b"PK\x03\x04"):
        raise UnsupportedError(f"{path}: is a zip archive (torch.save writes such files): {_OTHER}")


def refuse_pointers(folder: Path, names: list[str]) -> None:
    """Raise if files are git-lfs pointers: a clone without git-lfs has 130 bytes of text in place of every large file.

    Raises:
        CheckpointError: some are; the line names them.
    """
    found = []
    for name in names:
        path = folder / name
        try:
            if path.is_file() and path.stat().st_size <= _POINTER_BYTES and path.read_bytes().startswith(LFS_POINTER):
                found.append(name)
        except OSError:
            continue  # who reads it says so
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise CheckpointError(
            f"{folder}: {', '.join(found[:3])}{more}: git-lfs pointers and not the files themselves: run git lfs pull "
            "in this folder, or download it again"
        )


def refuse_folder(folder: Path) -> NoReturn:
    """Say what a folder with a config.json and without safetensors files holds instead.

    Raises:
        UnsupportedError: weights in another format.
        CheckpointError: no weights.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    pickles = [name for name in names if name.endswith(PICKLE_ENDINGS) and not name.startswith("training_args")]
    refuse_pointers(folder, pickles)
    if pickles:
        raise UnsupportedError(
            f"{folder}: only pickled weights ({pickles[0]}); loading them can run code: {convert_pickle(folder)}"
        )
    for name in names:
        kind = _ENDINGS.get(Path(name).suffix)
        if kind is not None:
            raise UnsupportedError(f"{folder}: {name} is {kind}, which kbit does not read: {_OTHER}")
    raise CheckpointError(f"{folder}: no safetensors files in this folder")


def convert_pickle(folder: Path) -> str:
    """What to do about pickled weights: transformers loads them without running what they hold."""
    return (
        "convert them to safetensors once with transformers: python -c 'from transformers import AutoModelForCausalLM "
        f'as M; M.from_pretrained("{folder}").save_pretrained("{folder}")\''
    )


def adapter_hint(folder: Path) -> str:
    """What to do about a LoRA adapter, with the name of its base where its configuration says that."""
    try:
        base = read_json_object(folder / "adapter_config.json").get("base_model_name_or_path")
    except CheckpointError:
        base = None
    named = f", {one_line(base, 100)}," if isinstance(base, str) and base else ""
    return (
        f"a LoRA adapter: merge it into its base model{named} first, with peft: "
        f'AutoPeftModelForCausalLM.from_pretrained("{folder}").merge_and_unload().save_pretrained("OUT")'
    )


def is_packed(tensors: Iterable[TensorInfo]) -> bool:
    """Whether tensors are what a quantizer makes: codes, or the scales that belong to some."""
    return any(
        (info.stored_as not in PLAIN and harmless(info) is None) or _COMPANIONS.search(info.name) for info in tensors
    )


def is_companion(info: TensorInfo) -> bool:
    """Whether a tensor is one of those that a quantizer stores for a packed weight."""
    return _COMPANIONS.search(info.name) is not None


class Quantizer(NamedTuple):
    """Who packed a checkpoint's weights.

    Attributes:
        method: as in quant_method of config.json; None where the weights are plain.
        certain: False where the tensors may be plain after all (`is_packed`): bitsandbytes packs plain weights as it
            loads them, and a file beside config.json may be left over from another model.
        section: what the configuration says of how.
    """

    method: str | None
    certain: bool = True
    section: Mapping[str, Any] = MappingProxyType({})


def quantizer_of(folder: Path, config: Mapping[str, Any]) -> Quantizer:
    """Who packed the weights, as config.json or a file beside it says.

    Raises:
        CheckpointError: its quantization_config is no object.
    """
    section = config.get("quantization_config")
    if section is None or section == {}:
        for key, writer in (("compression_config", "compressed-tensors"), ("quantization", "mlx")):
            if isinstance(config.get(key), dict):  # of compressed-tensors' first versions; of MLX
                return Quantizer(writer, section=config[key])
        for name, writer in _METHOD_FILES.items():
            if (folder / name).is_file():
                return Quantizer(writer, certain=False, section=read_json_object(folder / name))
        return Quantizer(None)
    if not isinstance(section, dict):
        raise CheckpointError(f"{folder}/config.json: quantization_config {str(section)[:80]!r} is not an object")
    method = section.get("quant_method")
    if method == "bitsandbytes" or (method is None and any(key.startswith(_BITSANDBYTES) for key in section)):
        return Quantizer("bitsandbytes", certain=False, section=section)
    if method is not None:
        return Quantizer(str(method), section=section)
    # Older tools left out their names.
    marks = {"desc_act": "gptq", "zero_point": "awq", "group_size": "mlx"}
    found = next((method for mark, method in marks.items() if mark in section), "an unnamed method")
    return Quantizer(found, section=section)


def refuse_method(folder: Path, method: str) -> NoReturn:
    """Say which quantizer has packed the weights.

    Raises:
        UnsupportedError: always.
    """
    shown = repr(method[:80])
    name = f"{_METHODS[method]} ({shown})" if method in _METHODS else shown
    raise UnsupportedError(
        f"{folder}/config.json: the weights are already quantized by {name}, which kbit does not read; {_ORIGINAL}"
    )
