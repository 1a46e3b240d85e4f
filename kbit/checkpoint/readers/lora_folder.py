"""A LoRA adapter as PEFT saves it, read as the model that it makes of its base: W + s B A, summed in float32.

The base is what `adapter_config.json` names: a folder, a .gguf file, or a hub id. Matrices with a LoRA become float32,
whatever the base holds them as; all others stay as they are. (Hu et al. 2021, arXiv 2106.09685; names and scales:
PEFT's documentation of its checkpoint format.)
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kbit.checkpoint.foreign import refuse_pointers
from kbit.checkpoint.readers.floats import to_float32
from kbit.checkpoint.readers.hf_folder import SIDECAR_NAMES, read_sidecar
from kbit.checkpoint.readers.safetensors_file import SafetensorsFile
from kbit.checkpoint.source import CANONICAL, CheckpointSource, StoredSource, TensorInfo
from kbit.host.errors import CheckpointError, UnsupportedError, one_line
from kbit.host.files import read_json_object
from kbit.host.notes import note

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kbit.formats.stored import AnyStored

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_PREFIX = "base_model.model."
_LORA = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.default)?(?:\.weight)?")
# What PEFT puts into the names of tensors that it saves whole.
_WRAPPED = re.compile(r"\.(modules_to_save\.default|original_module|base_layer)(?=\.)")
# What a tokenizer may begin with: where the adapter has one, that of the base is not mixed in.
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json")
_OF_THE_MODEL = ("generation_config.json", "preprocessor_config.json")
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class _Lora:
    """Where the two factors of one matrix are.

    Attributes:
        down, up: names of A (R, K) and B (N, R) in the file.
        scale: their product's factor.
        transposed: the product is the transpose of what is added.
    """

    down: str
    up: str
    scale: float
    transposed: bool


def is_adapter(folder: Path) -> bool:
    """Whether a folder is an adapter, and no model that stands beside one."""
    weights = {path.name for path in folder.glob("*.safetensors")} - {WEIGHTS}
    has = (folder / WEIGHTS).is_file() or ((folder / PICKLE).is_file() and not (folder / "config.json").is_file())
    return (folder / CONFIG).is_file() and has and not weights and not any(folder.glob("*.gguf"))


def base_of(folder: Path) -> str:
    """What an adapter's configuration says of its base: a path, seen from here or from the adapter, or a hub id.

    Raises:
        CheckpointError: it does not say.
    """
    base = read_json_object(folder / CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not base.strip():
        raise CheckpointError(
            f"{folder / CONFIG}: base_model_name_or_path is missing: write there which model the adapter is of, a "
            "folder or a hub id"
        )
    beside = folder / base
    return str(beside) if not Path(base).exists() and beside.exists() else base


class LoraFolder(StoredSource):
    """A model with a LoRA added.

    Args:
        path: the adapter's folder.
        opener: opens the base by its name.

    Raises:
        CheckpointError: something is missing or damaged; the message names the file.
        UnsupportedError: an adapter of another kind, or a base that it cannot be added to.
    """

    def __init__(self, path: Path, opener: Callable[[str], CheckpointSource]) -> None:
        self.path = path
        refuse_pointers(path, [WEIGHTS, CONFIG, *SIDECAR_NAMES])
        if not (path / WEIGHTS).is_file():
            raise UnsupportedError(
                f"{path}: its adapter is a pickle, and loading those can run code: {_unpickle(path)}"
            )
        settings = read_json_object(path / CONFIG)
        _check(path, settings)
        base = base_of(path)
        if Path(base).exists() and Path(base).resolve() == path.resolve():
            raise CheckpointError(f"{path / CONFIG}: base_model_name_or_path is the adapter itself, not its base model")
        self._file = SafetensorsFile(path / WEIGHTS)
        try:
            self._base = _opened(path, base, opener)
        except BaseException:
            self._file.close()
            raise
        try:
            self.config = dict(self._base.config)
            if self.config.get(CANONICAL):
                raise UnsupportedError(
                    f"{path}: its base {base} was converted by kbit, which rearranged its tensors: name the original "
                    f"in base_model_name_or_path of {CONFIG}, and convert the adapter's folder"
                )
            self._loras, self._replaced = self._sorted(settings)
            self._infos = self._describe()
        except BaseException:
            self.close()
            raise
        ranks = sorted({self._file.tensors[lora.down].shape[0] for lora in self._loras.values()})
        more = f", and {len(self._replaced)} replaced" if self._replaced else ""
        note(
            f"{path}: a LoRA of rank {', '.join(map(str, ranks))} is added to {len(self._loras)} matrices of {base} in "
            f"float32{more}"
        )

    def _sorted(self, settings: Mapping[str, Any]) -> tuple[dict[str, _Lora], dict[str, str]]:
        """The factors by the base's names, and what replaces tensors of the base."""
        factors: dict[str, dict[str, str]] = {}
        embeddings: set[str] = set()
        replaced: dict[str, str] = {}
        for stored in self._file.tensors:
            name = stored
            while name.startswith(_PREFIX):
                name = name.removeprefix(_PREFIX)
            found = _LORA.fullmatch(name)
            if found is None:
                replaced[_WRAPPED.sub("", name)] = stored
                continue
            factors.setdefault(f"{found[1]}.weight", {})[found[3]] = stored
            if found[2]:
                embeddings.add(f"{found[1]}.weight")
        loras = {}
        for name, both in factors.items():
            if set(both) != {"A", "B"}:
                raise CheckpointError(f"{self._file.path}: {next(iter(both.values()))} has no counterpart")
            rank = self._file.tensors[both["A"]].shape[0]
            transposed = name in embeddings or bool(settings.get("fan_in_fan_out"))
            loras[name] = _Lora(both["A"], both["B"], _scale(settings, name.removesuffix(".weight"), rank), transposed)
        if not loras and not replaced:
            raise CheckpointError(f"{self._file.path}: it holds no tensors")
        return loras, replaced

    def _describe(self) -> dict[str, TensorInfo]:
        infos, file = dict(self._base.tensors), self._file
        for name, stored in self._replaced.items():
            tensor = file.tensors[stored]
            head = name == _HEAD and name not in infos
            if name not in infos and not head:
                raise CheckpointError(f"{file.path}: {stored} is for a tensor that {self._base.path} does not have")
            if name.endswith((*_EMBEDDINGS, _HEAD)):
                self.config["vocab_size"] = tensor.shape[0]
            elif infos[name].shape != tensor.shape:
                raise CheckpointError(f"{file.path}: {stored} has another shape than {name} of {self._base.path}")
            if head:
                self.config["tie_word_embeddings"] = False
            infos[name] = TensorInfo(name, tensor.shape, tensor.dtype, tensor.nbytes, file.path)
        for name, lora in self._loras.items():
            info = infos.get(name)
            if info is None:
                raise CheckpointError(
                    f"{file.path}: {lora.down} is for {name}, which its base {self._base.path} does not have: check "
                    f"base_model_name_or_path in {CONFIG}"
                )
            (rank, columns), (rows, ranks) = file.tensors[lora.down].shape, file.tensors[lora.up].shape
            shape = (columns, rows) if lora.transposed else (rows, columns)
            if info.shape != shape or rank != ranks:
                raise CheckpointError(
                    f"{file.path}: {lora.down} and its counterpart make {shape[0]} x {shape[1]} numbers, but {name} of "
                    f"{self._base.path} is {' x '.join(map(str, info.shape))}: it is another base's"
                )
            infos[name] = replace(info, stored_as="F32", nbytes=4 * info.numel, file=file.path, packed_as="")
        return infos

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def _values(self, stored: str, start: int, stop: int) -> NDArray[np.float32]:
        tensor = self._file.tensors[stored]
        return to_float32(self._file.read_array(stored, start, stop), tensor.dtype)

    def read_array_rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        replaced, lora = self._replaced.get(name), self._loras.get(name)
        if replaced is not None:
            values = self._values(replaced, start, stop)
        else:
            values = self._base.read_array_rows(name, start, stop)
        if lora is None:
            return values
        rank, rows = self._file.tensors[lora.down].shape[0], self._file.tensors[lora.up].shape[0]
        if lora.transposed:
            delta = (self._values(lora.up, 0, rows) @ self._values(lora.down, 0, rank)[:, start:stop]).T
        else:
            delta = self._values(lora.up, start, stop) @ self._values(lora.down, 0, rank)
        merged: NDArray[np.float32] = values + delta * delta.dtype.type(lora.scale)
        return merged

    def read_stored(self, name: str) -> AnyStored:
        from kbit.formats.stored import KINDS, DenseMatrix

        replaced = self._replaced.get(name)
        if name not in self._loras and replaced is None:
            return self._base.read_stored(name)
        kind = None if name in self._loras or replaced is None else KINDS.get(self._file.tensors[replaced].dtype)
        if kind is None:
            return DenseMatrix(self.read_array(name), "fp32")
        return DenseMatrix(self._file.read_array(str(replaced)), kind)

    def sidecar_files(self) -> Mapping[str, bytes]:
        """The adapter's, where it has a tokenizer of its own; else the base's, and what the adapter has besides."""
        base = self._base.sidecar_files()
        own = {name: read_sidecar(self.path / name) for name in SIDECAR_NAMES if (self.path / name).is_file()}
        if any(name in own for name in _TOKENIZERS):
            base = {name: base[name] for name in base if name in _OF_THE_MODEL}
        return {**{name: base[name] for name in base}, **own}

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self._base.fingerprint().encode())
        for path in (self.path / CONFIG, *(self.path / name for name in SIDECAR_NAMES if (self.path / name).is_file())):
            digest.update(path.read_bytes())
        status = self._file.path.stat()
        digest.update(f"{status.st_size} {status.st_mtime_ns}".encode())
        return digest.hexdigest()

    def close(self) -> None:
        self._file.close()
        self._base.close()


def _opened(path: Path, base: str, opener: Callable[[str], CheckpointSource]) -> StoredSource:
    from kbit.host.errors import KbitError

    try:
        source = opener(base)
    except KbitError as error:
        raise type(error)(
            f"{path}: a LoRA adapter of {one_line(base, 100)}, which cannot be opened ({error}); download that model "
            f"and write its folder into {CONFIG} as base_model_name_or_path"
        ) from None
    assert isinstance(source, StoredSource)
    return source


def _check(path: Path, settings: Mapping[str, Any]) -> None:
    """
    Raises:
        UnsupportedError: an adapter that is more than pairs of factors.
    """
    kind = settings.get("peft_type")
    reason = None
    if kind != "LORA":
        reason = f"its kind is {one_line(str(kind), 40)}"
    for key, what in (
        ("use_dora", "it is a DoRA"),
        ("lora_bias", "its factors have biases"),
        ("target_parameters", "it changes experts that are stacked in one tensor"),
        ("trainable_token_indices", "it changes single rows of the embedding"),
        ("alora_invocation_tokens", "it is active from some token on only"),
        ("megatron_config", "it is of a Megatron model"),
    ):
        if settings.get(key):
            reason = f"{what} ({key})"
    if reason is not None:
        raise UnsupportedError(
            f"{path}: an adapter that kbit does not merge: {reason}; merge it with peft: "
            f'AutoPeftModelForCausalLM.from_pretrained("{path}").merge_and_unload().save_pretrained("OUT")'
        )


def _scale(settings: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / R, or alpha / sqrt(R); alpha may be another for modules whose names end like a pattern."""
    alpha = settings.get("lora_alpha", 8)
    for pattern, own in (settings.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = own
            break
    return float(alpha) / (sqrt(rank) if settings.get("use_rslora") else rank)


def _unpickle(path: Path) -> str:
    """What to do about pickled factors: torch loads numbers without running what a pickle holds."""
    return (
        "convert it once: python -c 'from safetensors.torch import save_file as s; from torch import load as l; "
        f's(l("{path / PICKLE}", weights_only=True), "{path / WEIGHTS}")\''
    )
