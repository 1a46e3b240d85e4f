"""A LoRA adapter as PEFT saves it, read as the model that it makes of its base: W + s B A, summed in float32.

The base is what `adapter_config.json` names: a folder, a .gguf file, or a hub id. Matrices with a LoRA become float32,
whatever the base holds them as; all others stay as they are. (Hu et al. 2021, arXiv 2106.09685; names and scales:
PEFT's documentation of its checkpoint format.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from kbit.checkpoint.readers.hf_folder import SIDECAR_NAMES, read_sidecar
from kbit.checkpoint.readers.lora_file import CONFIG, LoraFile, base_of
from kbit.checkpoint.source import CANONICAL, CheckpointSource, StoredSource, TensorInfo
from kbit.host.errors import CheckpointError, UnsupportedError, one_line
from kbit.host.notes import note

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kbit.formats.stored import AnyStored

# What a tokenizer may begin with: where the adapter has one, that of the base is not mixed in.
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json")
_OF_THE_MODEL = ("generation_config.json", "preprocessor_config.json")
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
_HEAD = "lm_head.weight"


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
        self._lora = LoraFile(path)
        try:
            self._base = self._opened_base(opener)
        except BaseException:
            self._lora.close()
            raise
        try:
            self.config = dict(self._base.config)
            if self.config.get(CANONICAL):
                raise UnsupportedError(
                    f"{path}: its base {base_of(path)} was converted by kbit, which rearranged its tensors: name the "
                    f"original in base_model_name_or_path of {CONFIG}, and convert the adapter's folder"
                )
            self._infos = self._describe()
        except BaseException:
            self.close()
            raise
        ranks = sorted({self._lora.file.tensors[lora.down].shape[0] for lora in self._lora.loras.values()})
        more = f", and {len(self._lora.replaced)} replaced" if self._lora.replaced else ""
        note(
            f"{path}: a LoRA of rank {', '.join(map(str, ranks))} is added to {len(self._lora.loras)} matrices of "
            f"{base_of(path)} in float32{more}"
        )

    def _opened_base(self, opener: Callable[[str], CheckpointSource]) -> StoredSource:
        base = base_of(self.path)
        if Path(base).exists() and Path(base).resolve() == self.path.resolve():
            raise CheckpointError(
                f"{self.path / CONFIG}: base_model_name_or_path is the adapter itself, not its base model"
            )
        return _opened(self.path, base, opener)

    def _describe(self) -> dict[str, TensorInfo]:
        infos, file = dict(self._base.tensors), self._lora.file
        for name, stored in self._lora.replaced.items():
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
        for name, lora in self._lora.loras.items():
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

    def read_array_rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        replaced, lora = self._lora.replaced.get(name), self._lora.loras.get(name)
        if replaced is not None:
            values = self._lora.values(replaced, start, stop)
        else:
            values = self._base.read_array_rows(name, start, stop)
        if lora is None:
            return values
        if lora.transposed:
            delta = (self._lora.values(lora.up) @ self._lora.values(lora.down)[:, start:stop]).T
        else:
            delta = self._lora.values(lora.up, start, stop) @ self._lora.values(lora.down)
        merged: NDArray[np.float32] = values + delta * delta.dtype.type(lora.scale)
        return merged

    def read_stored(self, name: str) -> AnyStored:
        from kbit.formats.stored import KINDS, DenseMatrix

        replaced = self._lora.replaced.get(name)
        if name not in self._lora.loras and replaced is None:
            return self._base.read_stored(name)
        kind = (
            None if name in self._lora.loras or replaced is None else KINDS.get(self._lora.file.tensors[replaced].dtype)
        )
        if kind is None:
            return DenseMatrix(self.read_array(name), "fp32")
        return DenseMatrix(self._lora.file.read_array(str(replaced)), kind)

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
        status = self._lora.file.path.stat()
        digest.update(f"{status.st_size} {status.st_mtime_ns}".encode())
        return digest.hexdigest()

    def close(self) -> None:
        self._lora.close()
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
