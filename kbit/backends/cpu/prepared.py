"""Prepared weights in a file: a model in the layout that the CPU engine reads, so that it starts by mapping it.

The first run of a model rearranges its weights (kernels/cpu/codecs/matrix.h) and keeps the result in the cache folder;
later ones map the file read-only and share its memory with every other process that does. The file holds all that a run
needs (configuration and tokenizer too), so the checkpoint itself is not opened again:

    bytes 0 to 4096     magic, where the index is, its length and sha256
    arrays              each at a multiple of 64 bytes: a matrix's codes, scales, offsets and codebook; vectors; files;
                        the tokenizer's table (kbit.text.token_table)
    index               JSON: what was prepared, and where each array begins

It is never stale: its name holds path, size, modification time and inode of every file of the checkpoint, and the
version of the layout. It is never half-written: it gets its name when all of it is on disk. Two processes that want to
make one do it in turn, and the second finds it made. Files of a checkpoint's earlier states, and of checkpoints that
are gone, are removed when a new one is written. `KBIT_PREPARED` names another folder, or says "off"; `kbit info` shows
the file and `kbit info --forget` removes it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from kbit import _native
from kbit.backends.cpu.prepared_nested import stretches_read
from kbit.backends.cpu.weight import NativeWeight
from kbit.checkpoint.ladder import Ladder
from kbit.checkpoint.narrowed import narrowed, narrowed_info
from kbit.checkpoint.prepared_place import prepared_path
from kbit.checkpoint.source import CheckpointSource, TensorInfo
from kbit.host.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray


Opener: TypeAlias = Callable[[str], CheckpointSource]

MAGIC = b"kbitprep"
HEAD_BYTES = 4096


class PreparedSource(CheckpointSource):
    """A checkpoint whose weights are prepared and mapped (a `kbit.graph.backend.HoldsPrepared`).

    Everything else about it reads as the checkpoint itself would, which is opened only if its plain weights are asked
    for.

    Args:
        file: written by `make`.
        opener: opens the checkpoint by its path; None: as it was published (`kbit.checkpoint.resolve`).

    Raises:
        CheckpointError: the file is damaged.
        OSError: it cannot be mapped.
    """

    def __init__(self, file: Path, opener: Opener | None = None) -> None:
        self.prepared = file
        self._opener = opener
        self._map = _native.MappedFile(str(file))
        try:
            index = _read_index(self._map)
            self.path = Path(index["path"])
            self.config = dict(index["config"])
            self._infos = {
                name: TensorInfo(name, tuple(shape), stored_as, nbytes, Path(where))
                for name, shape, stored_as, nbytes, where in index["tensors"]
            }
            self._matrices: dict[str, dict[str, Any]] = index["matrices"]
            self._vectors: dict[str, list[int]] = index["vectors"]
            self._files = {str(name): place for name, place in index["files"].items()}
            self._table: list[int] | None = index["token_table"]
            self._fingerprint = str(index["fingerprint"])
            self._nested: dict[str, dict[str, dict[str, Any]]] = index["nested"]
            self._stretches, self._common = index["stretches"], int(index["common"])
        except (KeyError, TypeError, ValueError) as error:
            raise self._damaged(error) from None
        self._original: CheckpointSource | None = None
        self._bits: float | None = None  # of nested matrices; None: the widest
        self._widths: Mapping[str, int] | None = None
        self._map.prefetch(0, self._common)  # where the disk must be read, all of it at its speed, and not page by page

    def at_width(self, bits: float) -> PreparedSource:
        """The same file, whole until now, at a number of bits of its nested matrices; it is mapped once.

        Raises:
            UsageError: the checkpoint does not serve so many.
        """
        ladder = Ladder.of(self)
        ladder.check(str(self.path), bits)
        other = copy(self)
        other._original, other._bits, other._widths = None, bits, ladder.at(bits)
        other._infos = {name: narrowed_info(info, other._widths) for name, info in self._infos.items()}
        return other

    def prefetch(self) -> None:
        """Asks the system to read nested matrices ahead, as far as the width needs them."""
        try:
            for begin, end in stretches_read(self._stretches, self._widths):
                self._map.prefetch(begin, end)
        except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
            raise self._damaged(error) from None

    def _damaged(self, why: object) -> CheckpointError:
        return CheckpointError(f"{self.prepared}: the prepared weights are damaged ({why}); remove the file")

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def prepared_weight(self, name: str) -> NativeWeight:
        """A matrix in the mapped file.

        Raises:
            CheckpointError: the file's index says what cannot be.
        """
        try:
            if name in self._nested:
                served = self._nested[name]
                place = served[str(max(map(int, served)) if self._widths is None else self._widths[name])]
            else:
                place = self._matrices[name]
            return NativeWeight(_native.map_matrix(self._map, **place))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise self._damaged(f"{name}: {error}") from None

    def prepared_vector(self, name: str) -> NDArray[np.float32]:
        """A norm's weight, a bias, or what `make` was told to keep as numbers: (E,), of the mapped file.

        Raises:
            CheckpointError: the file's index says what cannot be.
        """
        try:
            return self._map.bytes(*self._vectors[name]).view(np.float32)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise self._damaged(f"{name}: {error}") from None

    def sidecar_files(self) -> Mapping[str, bytes]:
        return _Files(self, self._files)

    def token_table(self) -> memoryview | None:
        return None if self._table is None else self.mapped(self._table).data

    def mapped(self, place: Sequence[int]) -> NDArray[np.uint8]:
        """The bytes [begin, end) of the file.

        Raises:
            CheckpointError: there are no such bytes.
        """
        try:
            begin, end = place
            return self._map.bytes(begin, end)
        except (TypeError, ValueError, OverflowError) as error:
            raise self._damaged(error) from None

    def fingerprint(self) -> str:
        return self._fingerprint

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._opened().read_rows(name, start, stop)

    def read_weight(self, name: str) -> Any:
        return self._opened().read_weight(name)

    def close(self) -> None:
        if self._original is not None:
            self._original.close()

    def _opened(self) -> CheckpointSource:
        from kbit.checkpoint.resolve import open_model

        if self._original is None:
            self._original = (self._opener or open_model)(str(self.path))
            if self._bits is not None:
                self._original = narrowed(self._original, self._bits)
        return self._original


class _Files(Mapping[str, bytes]):
    """The checkpoint's other files, each copied out of the map when it is asked for: a tokenizer.json is large."""

    def __init__(self, source: PreparedSource, places: Mapping[str, Sequence[int]]) -> None:
        self._source = source
        self._places = places

    def __getitem__(self, name: str) -> bytes:
        return self._source.mapped(self._places[name]).tobytes()

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def find(checkpoint: Path, opener: Opener | None = None) -> PreparedSource | None:
    """The prepared weights of a checkpoint as it is now, if there are any. A damaged file counts as none."""
    path = prepared_path(checkpoint)
    if path is None or not path.is_file():
        return None
    try:
        return PreparedSource(path, opener)
    except (OSError, CheckpointError):
        return None


def _read_index(file: _native.MappedFile) -> dict[str, Any]:
    """
    Raises:
        ValueError: the file is not what kbit.backends.cpu.prepared_writing writes.
    """
    head = file.bytes(0, min(HEAD_BYTES, len(file))).tobytes()
    begin, length = (int.from_bytes(head[at : at + 8], "little") for at in (8, 16))
    if not head.startswith(MAGIC):
        raise ValueError("it does not begin as such a file does")
    data = file.bytes(begin, begin + length).tobytes()
    if hashlib.sha256(data).digest() != head[24:56]:
        raise ValueError("its index has another sha256")
    index = json.loads(data)
    if not isinstance(index, dict):
        raise ValueError("its index is no object")
    return index
