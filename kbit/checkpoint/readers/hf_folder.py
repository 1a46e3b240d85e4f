"""Reading a Hugging Face model folder: config.json, safetensors (single or sharded), tokenizer files.

Weights in fp8 are multiplied out with the scales stored beside them: `weight_scale_inv` (one per block of 128 x 128,
as DeepSeek publishes) or `weight_scale` (one per tensor or per row). Stacks of matrices in MXFP4 stay packed
(`kbit.checkpoint.readers.mxfp4`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from kbit.checkpoint.compare import same_values
from kbit.checkpoint.foreign import adapter_hint, is_packed, quantizer_of, refuse_folder, refuse_method, refuse_pointers
from kbit.checkpoint.readers import mxfp4
from kbit.checkpoint.readers.floats import fp8_block_size, to_float32
from kbit.checkpoint.readers.safetensors_file import SafetensorsFile, StoredTensor
from kbit.checkpoint.readers.shard_files import parts_of_one, read_weight_map
from kbit.checkpoint.source import StoredSource, TensorInfo
from kbit.host.errors import CheckpointError, UnsupportedError
from kbit.host.files import MAX_TEXT_BYTES, read_json_object
from kbit.host.notes import note

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kbit.formats.stored import AnyStored, StoredMatrix

# Tokenizers in sentencepiece's own format. kbit does not read them, but says what to do about one (T5, XLM-R names).
SENTENCEPIECE_NAMES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
# Every file beside config.json and the weights that kbit reads, hints at, or hands on to other programs.
SIDECAR_NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    *SENTENCEPIECE_NAMES,
    "special_tokens_map.json",
    "added_tokens.json",
    "source.spm",
    "target.spm",
    "vocab.json",
    "target_vocab.json",
    "merges.txt",
    "generation_config.json",
    "preprocessor_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
# More chat templates, each by its name (transformers 4.50 and later).
TEMPLATES = "additional_chat_templates"
# Those of sentence-transformers: the first names the folders of further modules, of which these files are read.
MODULES_NAME = "modules.json"
SENTENCE_NAMES = (MODULES_NAME, "sentence_bert_config.json", "config_sentence_transformers.json")
MODULE_FILES = ("config.json", "model.safetensors", "pytorch_model.bin")
_MAX_MODULES = 16
INDEX_NAME = "model.safetensors.index.json"
_FP8 = ("F8_E4M3", "F8_E5M2")
# What PEFT, torch.compile and the parallel trainers put before the names of the model that they hold.
_WRAPPERS = ("base_model.model.", "_orig_mod.", "module.", "_fsdp_wrapped_module.")
# A head of its own, and what it may be tied to.
_HEAD = "lm_head.weight"
_EMBEDDINGS = ("embed_tokens.weight", "shared.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
_FLOATS = ("F64", "F32", "F16", "BF16", *_FP8)


class HFFolder(StoredSource):
    """A folder with config.json and safetensors files.

    Attributes:
        config: config.json; where it says that the head is tied and another one is stored, that it is not.

    Raises:
        CheckpointError: something is missing or damaged; the message names the file.
        UnsupportedError: the weights are in a form kbit does not read.
    """

    # Whether weights that other quantizers have packed are read, by a class made of this one.
    _unpacks = False

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_dir():
            raise CheckpointError(f"{path}: not a folder")
        weights = sorted(found.name for found in path.glob("*.safetensors"))
        if not (path / "config.json").is_file():
            hint = f" ({adapter_hint(path)})" if _is_adapter(path) else _elsewhere(path)
            raise CheckpointError(
                f"{path}: no config.json in this folder{hint}; give a Hugging Face model folder or a .gguf file"
            )
        refuse_pointers(path, [*weights, "config.json", INDEX_NAME, *SIDECAR_NAMES])
        if _is_adapter(path) and weights == ["adapter_model.safetensors"]:
            raise UnsupportedError(f"{path}: holds {adapter_hint(path)}")
        self.config = read_json_object(path / "config.json")
        if self.config.get("quantization_config") == {}:  # by nobody
            del self.config["quantization_config"]
        self._quantizer = quantizer_of(path, self.config)
        method, certain, _ = self._quantizer
        if method in (None, "fp8", "kbit", "mxfp4") or self._unpacks:
            method = None
        elif certain:
            refuse_method(path, method)
        else:
            self.config.pop("quantization_config", None)
        fp8 = not self._unpacks and self.config.get("quantization_config") is not None
        self._fp8_block = fp8_block_size(path, self.config) if fp8 else (128, 128)
        self._needs_scales = fp8
        self._files: dict[str, SafetensorsFile] = {}
        try:
            self._where = self._locate()
            self._unwrap()
            self._stacks = self._find_stacks()
            self._infos = self._describe()
            if method is not None:
                if is_packed(self._infos.values()):
                    refuse_method(path, method)
                note(f"{path}: {method} is named as the quantizer, but the weights are plain numbers, which are used")
            self._untie()
        except BaseException:
            self.close()
            raise

    def _locate(self) -> dict[str, SafetensorsFile]:
        """Which file holds each stored tensor.

        As in transformers model.safetensors stands before an index, but for what a file or an index lacks.
        """
        index_path = self.path / INDEX_NAME
        whole = self.path / "model.safetensors"
        if not index_path.is_file():
            return self._locate_without_index()
        try:
            weight_map = read_weight_map(index_path)
        except CheckpointError as error:
            if not whole.is_file():
                raise
            note(f"{error}; {whole.name} is used")
            weight_map = {}
        if whole.is_file() and whole.name not in weight_map.values():
            names = self._open(whole.name).tensors.keys()
            complete = weight_map and all((self.path / shard).is_file() for shard in weight_map.values())
            if weight_map.keys() <= names or not complete:
                if weight_map:
                    note(f"{self.path}: {whole.name} is used, and not the files that {INDEX_NAME} lists")
                return dict.fromkeys(names, self._open(whole.name))
            note(f"{self.path}: the files that {INDEX_NAME} lists are used; {whole.name} lacks some of its tensors")
        where = {}
        for name, shard in weight_map.items():
            file = self._open(shard)
            if name not in file.tensors:
                raise CheckpointError(f"{file.path}: {name} is missing, though {INDEX_NAME} says it is here")
            where[name] = file
        return where

    def _locate_without_index(self) -> dict[str, SafetensorsFile]:
        shards = sorted(path.name for path in self.path.glob("*.safetensors"))
        # Adapters are no models, and "consolidated" files are the same weights in Mistral's own names.
        shards = [name for name in shards if name != "adapter_model.safetensors"]
        shards = [name for name in shards if not name.startswith("consolidated")] or shards
        if not shards:
            refuse_folder(self.path)
        if "model.safetensors" in shards:
            shards = ["model.safetensors"]
        elif len(shards) > 1:
            parts = parts_of_one(shards)
            if parts is None:
                raise CheckpointError(f"{self.path}: {len(shards)} safetensors files but no {INDEX_NAME}")
            note(f"{self.path}: there is no {INDEX_NAME}; {parts[0]} to {parts[-1]} are used")
            shards = parts
        where: dict[str, SafetensorsFile] = {}
        for shard in shards:
            file = self._open(shard)
            for name in file.tensors:
                if name in where:
                    raise CheckpointError(f"{file.path}: {name} is also in {where[name].path.name}")
                where[name] = file
        return where

    def _unwrap(self) -> None:
        """Take off what wrappers of training put before every name.

        Raises:
            UnsupportedError: a LoRA is wrapped around the weights still.
        """
        lora = next((name for name in self._where if ".base_layer." in name), None)
        if lora is not None:
            raise UnsupportedError(
                f"{self.path}: {lora} is a weight with a LoRA beside it: merge them first (peft: merge_and_unload) and "
                "save the model again"
            )
        dropped = ""
        while prefix := next((p for p in _WRAPPERS if self._where and all(n.startswith(p) for n in self._where)), None):
            for file in self._files.values():
                file.drop_prefix(prefix)
            self._where = {name.removeprefix(prefix): file for name, file in self._where.items()}
            dropped += prefix
        if dropped:
            note(f"{self.path}: every tensor's name begins with {dropped}, which is left out")

    def _open(self, shard: str) -> SafetensorsFile:
        if shard not in self._files:
            path = self.path / shard
            if not path.is_file():
                raise CheckpointError(f"{path}: shard is missing; download it again")
            self._files[shard] = SafetensorsFile(path)
        return self._files[shard]

    def _describe(self) -> dict[str, TensorInfo]:
        infos = {}
        for name, shape in self._stacks.items():
            parts = [self._where[name + end] for end in (mxfp4.BLOCKS, mxfp4.SCALES)]
            nbytes = sum(
                file.tensors[name + end].nbytes for file, end in zip(parts, (mxfp4.BLOCKS, mxfp4.SCALES), strict=True)
            )
            infos[name] = TensorInfo(name, shape, mxfp4.STORED_AS, nbytes, parts[0].path)
        for name, file in self._where.items():
            stored = file.tensors[name]
            if name.removesuffix(mxfp4.BLOCKS).removesuffix(mxfp4.SCALES) in self._stacks:
                continue
            if self._scale_of(stored.name.removesuffix("_scale_inv").removesuffix("_scale")) == name:
                continue  # the scale of an fp8 weight, folded in on reading
            extra = self._scale_of(name)
            if extra is None and stored.dtype in _FP8 and self._needs_scales:
                raise CheckpointError(f"{file.path}: {name} is fp8, but its scale is missing; download the model again")
            nbytes = stored.nbytes + (self._where[extra].tensors[extra].nbytes if extra else 0)
            infos[name] = TensorInfo(name, stored.shape, stored.dtype, nbytes, file.path)
        return infos

    def _untie(self) -> None:
        """A tied model with a head of its own is not tied: as in transformers (`tie_weights`), what is stored counts.

        The only thing that opening reads of the data, and only of folders with both matrices.
        """
        head = self._infos.get(_HEAD)
        embeddings = [info for name, info in self._infos.items() if name.endswith(_EMBEDDINGS)]
        if self.config.get("tie_word_embeddings") is not True or head is None or len(embeddings) != 1:
            return
        if (
            head.shape == embeddings[0].shape
            and len(head.shape) == 2
            and not same_values(self, _HEAD, embeddings[0].name)
        ):
            self.config["tie_word_embeddings"] = False
            note(
                f"{self.path}: tie_word_embeddings is true in config.json, but {_HEAD} is stored and differs from "
                f"{embeddings[0].name}: it is used, as transformers does"
            )

    def _find_stacks(self) -> dict[str, tuple[int, int, int]]:
        """Stacks of matrices in MXFP4, where the configuration says that there are some."""
        if (self.config.get("quantization_config") or {}).get("quant_method") != "mxfp4":
            return {}
        return mxfp4.stacks({name: file.tensors[name] for name, file in self._where.items()}, str(self.path))

    def _blocks(self, name: str, index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Blocks (N, K / 32, 16) and scales (N, K / 32) of one matrix of a stack."""
        blocks, scales = (
            self._where[name + end].read_array(name + end, index, index + 1)[0] for end in (mxfp4.BLOCKS, mxfp4.SCALES)
        )
        return blocks, scales

    def read_packed(self, name: str, index: int) -> StoredMatrix:
        """One matrix of a stack that the file holds packed (a `kbit.checkpoint.source.PackedStacks`)."""
        return mxfp4.matrix_of(*self._blocks(name, index), f"{self.path}: {name}")

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
        if name in self._stacks:
            import numpy as np

            where = f"{self.path}: {name}"
            return np.stack([mxfp4.values_of(*self._blocks(name, index), where) for index in range(start, stop)])
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
            return np.asarray(values * scale.reshape(()))  # (a number, where there is no dimension)
        if len(shape) == 2:
            rows, columns = self._fp8_block
            if scale.shape == (-(-shape[0] // rows), -(-shape[1] // columns)):
                wide: NDArray[np.float32] = scale[np.arange(start, stop) // rows].repeat(columns, axis=1)
                return values * wide[:, : shape[1]]
            if scale.shape in ((shape[0],), (shape[0], 1)):
                return values * scale.reshape(-1, 1)[start:stop]
        raise UnsupportedError(f"{self.path}: {scale_name} of shape {scale.shape} does not fit {name} {shape}")

    def sidecar_files(self) -> Mapping[str, bytes]:
        return {name: read_sidecar(self.path / name) for name in self._sidecar_names()}

    def _sidecar_names(self) -> list[str]:
        """Those that are there, the first of them first."""
        names = [name for name in (*SIDECAR_NAMES, *SENTENCE_NAMES) if (self.path / name).is_file()]
        names += [f"{TEMPLATES}/{file.name}" for file in sorted((self.path / TEMPLATES).glob("*.jinja"))]
        if MODULES_NAME not in names:
            return names
        try:
            modules = json.loads(read_sidecar(self.path / MODULES_NAME))
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
            digest.update(os.fsencode(path.relative_to(self.path).as_posix()))
            digest.update(f" {status.st_size} {status.st_mtime_ns}\n".encode())
        for file in self._files.values():
            for tensor in file.tensors.values():
                digest.update(repr(tensor).encode())
        return digest.hexdigest()

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def read_sidecar(path: Path) -> bytes:
    """A file beside the weights.

    Raises:
        CheckpointError: it cannot be read, or is far too large.
    """
    try:
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise CheckpointError(f"{path}: {path.stat().st_size} bytes is too large for a tokenizer's file")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None


def _is_adapter(path: Path) -> bool:
    return (path / "adapter_config.json").is_file()


def _elsewhere(path: Path) -> str:
    """Where a model may be that is not in this folder: below it, as in the hub's cache and among a trainer's output."""
    places = ("*/config.json", "snapshots/*/config.json", "*/adapter_config.json")
    found = {config.parent for place in places for config in path.glob(place)}
    newest = max(found, key=lambda folder: (_number_of(folder.name), folder.name), default=None)
    return f" (but there is one in {newest})" if newest is not None else ""


def _number_of(name: str) -> int:
    """The steps of a folder such as checkpoint-1000; 0 of others."""
    steps = name.rpartition("-")[2]
    return int(steps) if steps.isascii() and steps.isdigit() else 0
