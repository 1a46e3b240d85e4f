"""Reading a Hugging Face model folder: config.json, safetensors (single or sharded), tokenizer files.

Weights in fp8 are multiplied out with the scales stored beside them: `weight_scale_inv` (one per block of 128 x 128,
as DeepSeek publishes) or `weight_scale` (one per tensor or per row).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kbit.checkpoint.readers.safetensors_file import SafetensorsFile, StoredTensor
from kbit.checkpoint.source import StoredSource, TensorInfo
from kbit.host.errors import CheckpointError, UnsupportedError
from kbit.host.files import MAX_TEXT_BYTES, read_json_object

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kbit.formats.stored import AnyStored

# Tokenizers in sentencepiece's own format. kbit does not read them, but says what to do about one (T5, XLM-R names).
SENTENCEPIECE_NAMES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
# Every file beside config.json and the weights that kbit reads, hints at, or hands on to other programs.
SIDECAR_NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    *SENTENCEPIECE_NAMES,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
# Those of sentence-transformers: the first names the folders of further modules, of which these files are read.
MODULES_NAME = "modules.json"
SENTENCE_NAMES = (MODULES_NAME, "sentence_bert_config.json", "config_sentence_transformers.json")
MODULE_FILES = ("config.json", "model.safetensors", "pytorch_model.bin")
_MAX_MODULES = 16
INDEX_NAME = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_FP8 = ("F8_E4M3", "F8_E5M2")
_FLOATS = ("F64", "F32", "F16", "BF16", *_FP8)


class HFFolder(StoredSource):
    """A folder with config.json and safetensors files.

    Raises:
        CheckpointError: something is missing or damaged; the message names the file.
        UnsupportedError: the weights are in a form kbit does not read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_dir():
            raise CheckpointError(f"{path}: not a folder")
        if not (path / "config.json").is_file():
            hint = " (a LoRA adapter: merge it into its base model first)" if _is_adapter(path) else ""
            raise CheckpointError(
                f"{path}: no config.json in this folder{hint}; give a Hugging Face model folder or a .gguf file"
            )
        self.config = read_json_object(path / "config.json")
        self._fp8_block = _fp8_block_size(path, self.config)
        self._needs_scales = self.config.get("quantization_config") is not None
        self._files: dict[str, SafetensorsFile] = {}
        try:
            self._where = self._locate()
            self._infos = self._describe()
        except BaseException:
            self.close()
            raise

    def _locate(self) -> dict[str, SafetensorsFile]:
        """Which file holds each stored tensor."""
        index_path = self.path / INDEX_NAME
        if not index_path.is_file():
            shards = sorted(self.path.glob("*.safetensors"))
            if not shards:
                pickles = sorted(found.name for pattern in _PICKLES for found in self.path.glob(pattern))
                if pickles:
                    raise UnsupportedError(
                        f"{self.path}: only pickled weights ({pickles[0]}); loading them can run code: convert them to "
                        "safetensors first"
                    )
                raise CheckpointError(f"{self.path}: no safetensors files in this folder")
            if len(shards) > 1 and not (self.path / "model.safetensors").is_file():
                raise CheckpointError(f"{self.path}: {len(shards)} safetensors files but no {INDEX_NAME}")
            only = self.path / "model.safetensors" if len(shards) > 1 else shards[0]
            file = self._open(only.name)
            return dict.fromkeys(file.tensors, file)
        weight_map = read_json_object(index_path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index_path}: no weight_map object in it; download it again")
        where = {}
        for name, shard in weight_map.items():
            if not isinstance(shard, str) or Path(shard).name != shard:
                raise CheckpointError(f"{index_path}: {name} points to {shard!r}, which is not a plain file name")
            file = self._open(shard)
            if name not in file.tensors:
                raise CheckpointError(f"{file.path}: {name} is missing, though {INDEX_NAME} says it is here")
            where[name] = file
        return where

    def _open(self, shard: str) -> SafetensorsFile:
        if shard not in self._files:
            path = self.path / shard
            if not path.is_file():
                raise CheckpointError(f"{path}: shard is missing; download it again")
            self._files[shard] = SafetensorsFile(path)
        return self._files[shard]

    def _describe(self) -> dict[str, TensorInfo]:
        infos = {}
        for name, file in self._where.items():
            stored = file.tensors[name]
            if self._scale_of(stored.name.removesuffix("_scale_inv").removesuffix("_scale")) == name:
                continue  # the scale of an fp8 weight, folded in on reading
            extra = self._scale_of(name)
            if extra is None and stored.dtype in _FP8 and self._needs_scales:
                raise CheckpointError(f"{file.path}: {name} is fp8, but its scale is missing; download the model again")
            nbytes = stored.nbytes + (self._where[extra].tensors[extra].nbytes if extra else 0)
            infos[name] = TensorInfo(name, stored.shape, stored.dtype, nbytes, file.path)
        return infos

    def _scale_of(self, name: str) -> str | None:
        file = self._where.get(name)
        if file is None or file.tensors[name].dtype not in _FP8:
            return None
        return next((f"{name}{end}" for end in ("_scale_inv", "_scale") if f"{name}{end}" in self._where), None)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def stored(self, name: str) -> StoredTensor:
        """The header entry of a tensor."""
        return self._where[name].tensors[name]

    def read_array_rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        file = self._where[name]
        stored = file.tensors[name]
        if stored.dtype not in _FLOATS:
            raise UnsupportedError(f"{file.path}: {name} is {stored.dtype}, but weights must be floating point")
        values = to_float32(file.read_array(name, start, stop), stored.dtype)
        scale_name = self._scale_of(name)
        if scale_name is not None:
            values = self._apply_fp8_scale(name, values, scale_name, start, stop)
        return values

    def read_stored(self, name: str) -> AnyStored:
        from kbit.formats.stored import KINDS, DenseMatrix

        file = self._where[name]
        kind = KINDS.get(file.tensors[name].dtype)
        return DenseMatrix(self.read_array(name), "fp32") if kind is None else DenseMatrix(file.read_array(name), kind)

    def _apply_fp8_scale(
        self, name: str, values: NDArray[np.float32], scale_name: str, start: int, stop: int
    ) -> NDArray[np.float32]:
        import numpy as np

        file = self._where[scale_name]
        scale = to_float32(file.read_array(scale_name), file.tensors[scale_name].dtype)
        shape = self.stored(name).shape
        if scale.size == 1:
            return values * scale.reshape(())
        if len(shape) == 2:
            rows, columns = self._fp8_block
            if scale.shape == (-(-shape[0] // rows), -(-shape[1] // columns)):
                wide: NDArray[np.float32] = scale[np.arange(start, stop) // rows].repeat(columns, axis=1)
                return values * wide[:, : shape[1]]
            if scale.shape in ((shape[0],), (shape[0], 1)):
                return values * scale.reshape(-1, 1)[start:stop]
        raise UnsupportedError(f"{self.path}: {scale_name} of shape {scale.shape} does not fit {name} {shape}")

    def sidecar_files(self) -> Mapping[str, bytes]:
        return {name: _read_bytes(self.path / name) for name in self._sidecar_names()}

    def _sidecar_names(self) -> list[str]:
        """Those that are there, the first of them first."""
        names = [name for name in (*SIDECAR_NAMES, *SENTENCE_NAMES) if (self.path / name).is_file()]
        if MODULES_NAME not in names:
            return names
        try:
            modules = json.loads(_read_bytes(self.path / MODULES_NAME))
            folders = [module["path"] for module in modules[:_MAX_MODULES]]
        except (ValueError, KeyError, TypeError, RecursionError):
            return names  # who reads them says what is wrong
        for folder in folders:
            # A plain name: what a file says must not lead out of the folder.
            if isinstance(folder, str) and folder and Path(folder).name == folder and folder != "..":
                names += [f"{folder}/{name}" for name in MODULE_FILES if (self.path / folder / name).is_file()]
        return list(dict.fromkeys(names))

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        files = [self.path / "config.json", *(file.path for file in self._files.values())]
        files += [self.path / name for name in self._sidecar_names()]
        for path in sorted(files):
            status = path.stat()
            digest.update(f"{path.relative_to(self.path).as_posix()} {status.st_size} {status.st_mtime_ns}\n".encode())
        for file in self._files.values():
            for tensor in file.tensors.values():
                digest.update(repr(tensor).encode())
        return digest.hexdigest()

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def to_float32(values: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Stored numbers as float32: exact, but for F64, which is rounded.

    Args:
        values: as `SafetensorsFile.read_array` gives them.
        dtype: their safetensors name.
    """
    import numpy as np

    from kbit.formats.stored import KINDS, widened

    if dtype in KINDS:
        return widened(values, KINDS[dtype])
    if dtype == "F8_E5M2":  # the upper half of an fp16 number
        return widened(values.astype(np.uint16) << np.uint16(8), "fp16")
    if dtype == "F8_E4M3":
        found: NDArray[np.float32] = _e4m3_values()[values]
        return found
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, which those who load refuse
        return values.astype(np.float32)


@lru_cache(maxsize=1)
def _e4m3_values() -> NDArray[np.float32]:
    """The number behind every code of OCP's E4M3 (FN: no infinity, NaN where all other bits are set): (256,)."""
    import numpy as np

    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    normal = np.ldexp(1.0 + mantissa / 8, exponent - 7)
    values = np.where(exponent == 0, np.ldexp(mantissa / 8, -6), normal)
    values[codes & 127 == 127] = np.nan
    signed: NDArray[np.float32] = np.where(codes & 128, -values, values).astype(np.float32)
    return signed


def _read_bytes(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise CheckpointError(f"{path}: {path.stat().st_size} bytes is too large for a tokenizer's file")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None


def _is_adapter(path: Path) -> bool:
    return (path / "adapter_config.json").is_file()


def _fp8_block_size(path: Path, config: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns per fp8 scale; refuses checkpoints another quantizer has packed."""
    quantization = config.get("quantization_config")
    if quantization is None:
        return 128, 128
    if not isinstance(quantization, dict):
        raise CheckpointError(f"{path}/config.json: quantization_config {str(quantization)[:80]!r} is not an object")
    method = quantization.get("quant_method")
    if method not in ("fp8", "kbit"):
        raise UnsupportedError(
            f"{path}/config.json: the weights are already quantized by {str(method)[:80]!r}, which kbit does not read; "
            "use the original 16-bit checkpoint"
        )
    block = quantization.get("weight_block_size") or [128, 128]
    if not (isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)):
        raise CheckpointError(f"{path}/config.json: weight_block_size {block!r} is not a pair of positive numbers")
    return block[0], block[1]
