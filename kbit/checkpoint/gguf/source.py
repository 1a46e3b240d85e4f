"""A GGUF file as a CheckpointSource: Hugging Face names, shapes, row order, config and tokenizer files."""

from __future__ import annotations

import hashlib
import os
import re
import struct
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, BinaryIO

from kbit.checkpoint.gguf.config import architecture_of, config_from_header
from kbit.checkpoint.gguf.header import read_header
from kbit.checkpoint.gguf.locating import located
from kbit.checkpoint.gguf.metadata import GGUFHeader, GGUFTensor, quoted
from kbit.checkpoint.gguf.names import ROPE_FACTORS, ROPE_FREQS
from kbit.checkpoint.gguf.orders import Piece
from kbit.checkpoint.gguf.reading import Located, read_at, read_into, read_packed, read_transposed
from kbit.checkpoint.gguf.t5 import CONTEXT as T5_CONTEXT
from kbit.checkpoint.source import StoredSource, TensorInfo
from kbit.host.errors import CheckpointError, UnsupportedError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from kbit.formats.stored import AnyStored

_COPY_BYTES = 1 << 22

_PART_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


class GGUFSource(StoredSource):
    """A model in a GGUF file, or in the parts of a split one (give the first part).

    Opening reads headers only (no torch, no numpy). Tensor data is read with plain positioned reads, a few rows at
    a time, not through a map: memory stays at the output plus about 30 MB, and a file that shrinks while it is used
    is an error instead of a SIGBUS.

    Args:
        path: the .gguf file.

    Raises:
        CheckpointError: unreadable, truncated or inconsistent.
        UnsupportedError: an architecture, format version, tensor or RoPE scaling kbit does not implement.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._closed = False
        self._sidecars: dict[str, bytes] | None = None
        header = read_header(self.path)
        self._parts = _open_parts(header)
        self._stats = {part.path: _stat(part.path) for part in self._parts}
        arch = architecture_of(header)

        tables: dict[str, GGUFTensor] = {}
        owner: dict[str, GGUFHeader] = {}
        for part in self._parts:
            for name, tensor in part.tensors.items():
                if name in tables:
                    part.fail(f"tensor {quoted(name)} is also in {owner[name].path.name}")
                tables[name], owner[name] = tensor, part
        divisors = _rope_divisors(owner[ROPE_FREQS], tables[ROPE_FREQS]) if ROPE_FREQS in tables else None
        factors = None
        if arch.scaled and any(name in tables for name in ROPE_FACTORS):
            for name in ROPE_FACTORS:
                if name not in tables:
                    header.fail(f"tensor '{name}' is missing", "download or convert the file again")
            short, long = (_rope_divisors(owner[name], tables[name]) for name in ROPE_FACTORS)
            factors = short, long
        self.config: dict[str, Any] = config_from_header(header, tables, divisors, factors)
        self.header = header

        self._located: dict[str, Located] = {}
        infos: dict[str, TensorInfo] = {}
        for name, tensor in tables.items():
            # (Of factors of RoPE there are none: config_from_header has turned them into rope_scaling.)
            for at in located(arch, self.config, name, tensor, owner[name]):
                held = at.tensor
                kind = "F32" if at.transposed else held.type.name
                nbytes = 4 * prod(at.shape) if at.transposed else held.nbytes
                self._located[at.piece.name] = at
                infos[at.piece.name] = TensorInfo(at.piece.name, at.shape, kind, nbytes, owner[name].path)
        self._infos = MappingProxyType(infos)
        beside = [name for name in arch.beside if name in tables]
        self._beside = {name: Located(Piece(name, tables[name]), owner[name], 0, 0) for name in beside}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors by Hugging Face name, in file order."""
        return self._infos

    def read_array_rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Rows [start, stop) of a tensor as float32, in Hugging Face row order; see CheckpointSource.read_rows.

        Raises:
            CheckpointError: no such tensor, or the data cannot be read.
            UnsupportedError: a tensor type that the installed gguf package cannot dequantize.
            ValueError: a row range outside the tensor, or the source is closed.
        """
        import numpy as np

        if self._closed:
            raise ValueError(f"{self.path}: read after close")
        located = self._located.get(name)
        if located is None:
            raise CheckpointError(f"{self.path}: there is no tensor {quoted(name)}; list the tensors with kbit info")
        shape = located.shape
        if not 0 <= start <= stop <= shape[0]:
            raise ValueError(f"rows {start}:{stop} are outside tensor {name} with {shape[0]} rows")
        out = np.empty((stop - start, *shape[1:]), dtype=np.float32)
        if start < stop:
            with self._open(located.header) as file:
                if located.transposed:
                    return read_transposed(file, located, start, stop)
                read_into(file, located, start, stop, out)
        return out

    def read_stored(self, name: str) -> AnyStored:
        """A matrix of a block type kbit can run packed comes as its codes and scales, exactly; others as float32."""
        from kbit.checkpoint.gguf.blocks import BLOCK_TYPES
        from kbit.formats.stored import KINDS, DenseMatrix, narrowed

        located = self._located.get(name)
        plain = located is None or located.transposed or len(located.shape) != 2
        if located is None or plain or located.tensor.type.name not in BLOCK_TYPES:
            values = self.read_array(name)
            kind = KINDS.get(self._infos[name].stored_as, "fp32")
            return DenseMatrix(narrowed(values, kind), kind)
        if self._closed:
            raise ValueError(f"{self.path}: read after close")
        with self._open(located.header) as file:
            return read_packed(file, located, BLOCK_TYPES[located.tensor.type.name])

    def _read_beside(self, name: str) -> tuple[GGUFTensor, npt.NDArray[np.float32]] | None:
        """A tensor that is no part of the model, and its values."""
        import numpy as np

        located = self._beside.get(name)
        if located is None:
            return None
        out = np.empty(located.shape, dtype=np.float32)
        with self._open(located.header) as file:
            read_into(file, located, 0, located.shape[0], out)
        return located.tensor, out

    def stored_tensors(self) -> list[GGUFTensor]:
        """The tensors of all parts as they are stored, in the order of the files."""
        return [tensor for part in self._parts for tensor in part.tensors.values()]

    def stored_bytes(self, name: str) -> Iterator[bytes]:
        """A tensor's bytes, a few MB at a time, by its name in the file.

        Raises:
            CheckpointError: they cannot be read.
        """
        part = next(part for part in self._parts if name in part.tensors)
        tensor = part.tensors[name]
        with self._open(part) as file:
            for start in range(0, tensor.nbytes, _COPY_BYTES):
                yield read_at(file, part.path, tensor.offset + start, min(_COPY_BYTES, tensor.nbytes - start))

    def stored_metadata(self) -> dict[str, tuple[int | tuple[int, int], Any]]:
        """All metadata as it is stored, by key: type (and type of items) and value; but what says that there are parts,
        and how data are aligned."""
        keys = (key for key in self.header if not key.startswith("split."))
        return {key: self.header.typed(key) for key in keys if key != "general.alignment"}

    def sidecar_files(self) -> Mapping[str, bytes]:
        """tokenizer.json, tokenizer_config.json and generation_config.json, rebuilt from the metadata."""
        if self._sidecars is None:
            from kbit.checkpoint.gguf.tokenizer import sidecars_from_header
            from kbit.checkpoint.gguf.vectors import sentence_files

            context = int(self.config.get("max_position_embeddings", T5_CONTEXT))
            self._sidecars = sidecars_from_header(self.header, context)
            arch = architecture_of(self.header)
            if arch.encoder or arch.beside:
                self._sidecars |= sentence_files(self.header, int(self.config["hidden_size"]), self._read_beside)
        return MappingProxyType(self._sidecars)

    def fingerprint(self) -> str:
        """SHA-256 over each part's header, size and modification time."""
        digest = hashlib.sha256()
        for part in self._parts:
            digest.update(struct.pack("<QQq", len(part.raw), *self._stats[part.path]))
            digest.update(part.raw)
        return digest.hexdigest()

    def close(self) -> None:
        """Mark the source closed (no file stays open between reads)."""
        self._closed = True

    def _open(self, header: GGUFHeader) -> BinaryIO:
        try:
            file = open(header.path, "rb")  # noqa: SIM115 (the caller closes it)
        except OSError as error:
            raise CheckpointError(f"{header.path}: cannot read the file ({error.strerror or error})") from error
        stat = os.fstat(file.fileno())
        if (stat.st_size, stat.st_mtime_ns) != self._stats[header.path]:
            file.close()
            raise CheckpointError(f"{header.path}: the file changed while it was in use; run the command again")
        return file


def _stat(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read the file ({error.strerror or error})") from error
    return stat.st_size, stat.st_mtime_ns


def _open_parts(first: GGUFHeader) -> list[GGUFHeader]:
    """The headers of all parts of a split file (llama.cpp's gguf-split), or just the given one."""
    count = first.integer("split.count") or 0
    if count <= 1 and not first.integer("split.no"):
        return [first]
    path = first.path
    match = _PART_NAME.fullmatch(path.name)
    if match is None or int(match.group(3)) != count:
        first.fail(
            f"one of {count} parts, but not named NAME-00001-of-{count:05d}.gguf",
            "restore its name, or merge the parts with llama-gguf-split --merge",
        )
    names = [f"{match.group(1)}-{index:05d}-of-{count:05d}.gguf" for index in range(1, count + 1)]
    if first.integer("split.no") != 0 or path.name != names[0]:
        first.fail(f"not the first of {count} parts", f"give {names[0]}")
    headers = [first]
    for index, name in enumerate(names[1:], start=1):
        part = path.with_name(name)
        if not part.is_file():
            first.fail(f"part {index + 1} of {count}, {name}, is missing beside it", "download all parts")
        header = read_header(part)
        if header.integer("split.no") != index or header.integer("split.count") != count:
            header.fail(f"does not say that it is part {index + 1} of {count}")
        headers.append(header)
    total = first.integer("split.tensors.count")
    found = sum(len(header.tensors) for header in headers)
    if total is not None and total != found:
        first.fail(f"its parts hold {found} tensors, the metadata says {total}", "download all parts again")
    return headers


def _rope_divisors(header: GGUFHeader, tensor: GGUFTensor) -> list[float]:
    """The values of rope_freqs.weight (D/2 numbers), read without numpy."""
    code = {"F32": "f", "F16": "e"}.get(tensor.type.name)
    if code is None or len(tensor.shape) != 1 or tensor.shape[0] > 1 << 16:
        raise UnsupportedError(
            f"{header.path}: tensor 'rope_freqs.weight' has type {tensor.type.name} and shape {tensor.shape}, "
            "expected a short F32 vector"
        )
    try:
        with open(header.path, "rb") as file:
            data = read_at(file, header.path, tensor.offset, tensor.nbytes)
    except OSError as error:
        raise CheckpointError(f"{header.path}: cannot read the file ({error.strerror or error})") from error
    return list(struct.unpack(f"<{tensor.shape[0]}{code}", data))
