"""Writing a GGUF file (version 3): complete and on disk, or not there. Layout: `kbit.checkpoint.gguf.header`."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

from kbit.checkpoint.gguf.types import ARRAY, BOOL, GGML_TYPES, SCALARS, STRING
from kbit.host.errors import KbitError, UsageError
from kbit.host.files import fsync_folder

# A number of the file's types, or for an array (ARRAY, type of its items), and the value.
Typed: TypeAlias = "tuple[int | tuple[int, int], Any]"
# Whole numbers are uint32 where they fit, and int32 in arrays; others float32.
Value: TypeAlias = "bool | int | float | str | list[str] | list[bool] | list[int] | list[float] | Typed"

_ALIGNMENT = 32
_U32, _I32, _F32, _I64 = 4, 5, 6, 11
_NUMBERS = {kind.name: number for number, kind in GGML_TYPES.items()}


@dataclass(frozen=True)
class NewTensor:
    """A tensor to be written.

    Attributes:
        name: in the file.
        shape: outermost dimension first.
        type: ggml's name.
    """

    name: str
    shape: tuple[int, ...]
    type: str

    @property
    def nbytes(self) -> int:
        kind, count = GGML_TYPES[_NUMBERS[self.type]], 1
        for dim in self.shape:
            count *= dim
        return count // kind.block * kind.block_bytes


class GGUFWriter:
    """Writes a file beside the one that is to be, and puts it in its place when all of it is on disk.

    Args:
        out: the file.
        metadata: keys and values, in order.
        tensors: in order.
        overwrite: replace a GGUF file that is there.

    Raises:
        UsageError: something is in the way.
        KbitError: no permission, or a full disk.
    """

    def __init__(
        self, out: Path, metadata: Mapping[str, Value], tensors: Sequence[NewTensor], *, overwrite: bool = False
    ) -> None:
        check_output_file(out, overwrite=overwrite)
        self.out, self.partial = out, out.with_name(out.name + ".partial")
        head, places, self.nbytes = _laid_out(metadata, tensors)
        self._tensors = {tensor.name: (places[tensor.name], tensor.nbytes) for tensor in tensors}
        self._left = set(places)
        self._finished = False
        with self._errors():
            out.absolute().parent.mkdir(parents=True, exist_ok=True)
            self._file = self.partial.open("w+b")
            self._file.truncate(self.nbytes)
            self._file.write(head)
            self._file.flush()

    def write(self, name: str, pieces: Iterable[bytes | memoryview]) -> None:
        """The bytes of a tensor."""
        (place, nbytes), written = self._tensors[name], 0
        with self._errors():
            self._file.seek(place)
            for piece in pieces:
                written += self._file.write(piece)
            self._file.flush()
        if written != nbytes:
            raise RuntimeError(f"{name}: {written} bytes written, {nbytes} planned")
        self._left.discard(name)

    def finish(self) -> None:
        """Put the file in its place."""
        if self._left:
            raise RuntimeError(f"not written: {sorted(self._left)}")
        with self._errors():
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self.partial, self.out)
            fsync_folder(self.out.absolute().parent)
        self._finished = True

    def __enter__(self) -> GGUFWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None) -> None:
        if not self._finished:
            with suppress(OSError):
                self._file.close()
            self.partial.unlink(missing_ok=True)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise KbitError(f"{self.partial}: the disk is full; make room and run the same command again") from None
            raise KbitError(f"{error.filename or self.partial}: cannot be written ({error.strerror})") from None


def check_output_file(out: Path, *, overwrite: bool) -> None:
    """Refuse a file that would destroy something.

    Raises:
        UsageError: it would, or its name is none of a GGUF file.
        KbitError: what is there cannot be read.
    """
    if out.suffix != ".gguf":
        raise UsageError(f"{out}: name a file that ends in .gguf")
    if out.is_symlink() or out.is_dir():
        raise UsageError(f"{out}: is a {'symbolic link' if out.is_symlink() else 'folder'}; name a file to create")
    if not out.exists():
        return
    if not overwrite:
        raise UsageError(f"{out}: exists; name another file, or replace it with --force")
    try:
        with out.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise KbitError(f"{out}: cannot be read ({error.strerror})") from None
    if magic != b"GGUF":
        raise UsageError(f"{out}: exists and is no GGUF file; name another")


def header_bytes(metadata: Mapping[str, Value]) -> bytes:
    """The header of a file without tensors."""
    return _laid_out(metadata, ())[0]


def _laid_out(metadata: Mapping[str, Value], tensors: Sequence[NewTensor]) -> tuple[bytes, dict[str, int], int]:
    """The header, where every tensor goes, and the size of the file."""
    head = bytearray(struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata)))
    for key, value in metadata.items():
        head += _string(key) + _encoded(value)
    offsets, place = {}, 0
    for tensor in tensors:
        offsets[tensor.name] = place
        dims = tensor.shape[::-1]
        head += _string(tensor.name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        head += struct.pack("<IQ", _NUMBERS[tensor.type], place)
        place += tensor.nbytes
        place += -place % _ALIGNMENT
    head += b"\0" * (-len(head) % _ALIGNMENT)
    start = len(head)
    return bytes(head), {name: start + offset for name, offset in offsets.items()}, start + place


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _encoded(value: Value) -> bytes:
    """A value's type and the value."""
    kind, content = value if isinstance(value, tuple) else _typed(value)
    if isinstance(kind, tuple):
        return struct.pack("<IIQ", kind[0], kind[1], len(content)) + b"".join(_item(kind[1], each) for each in content)
    return struct.pack("<I", kind) + _item(kind, content)


def _typed(value: bool | int | float | str | list[Any]) -> Typed:
    if isinstance(value, list):
        first = value[0] if value else ""
        kind = BOOL if isinstance(first, bool) else _I32 if isinstance(first, int) else _F32
        return (ARRAY, STRING if isinstance(first, str) else kind), value
    if isinstance(value, bool):
        return BOOL, value
    if isinstance(value, int):
        return _U32 if 0 <= value < 1 << 32 else _I64, value
    return (STRING if isinstance(value, str) else _F32), value


def _item(kind: int, value: Any) -> bytes:
    return _string(value) if kind == STRING else SCALARS[kind].pack(value)
