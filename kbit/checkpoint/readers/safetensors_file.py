"""Reading one safetensors file: a header that is trusted in nothing, and tensors copied out one at a time.

Why not safetensors' own `safe_open`: it maps the whole file for as long as it is open, so every page ever touched
counts as resident and converting a model would "need" as much memory as the model has bytes; and it brings torch in,
which `kbit info` cannot wait for. The layout is 8 bytes of header length, a JSON header, then the data
(https://github.com/huggingface/safetensors, "Format").

Why positioned reads and no map of our own: the data is copied out anyway, and a file that shrinks (or a disk that
fails) while it is mapped ends the process with SIGBUS instead of an error.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from kbit.checkpoint.foreign import refuse_file
from kbit.host.errors import CheckpointError, UnsupportedError

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

# The limit the safetensors library sets too; the largest published headers are below 2 MB.
MAX_HEADER_BYTES = 100_000_000

# Of torch.save's zip files and of bare pickles (protocols 2 to 5).
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")

# Real names have below 100 characters.
_MAX_NAME = 1000

# Bytes per element, torch's name and numpy's of every dtype kbit reads; what numpy lacks comes as bit patterns.
_DTYPES: Mapping[str, tuple[int, str, str]] = {
    "BOOL": (1, "bool", "?"),
    "U8": (1, "uint8", "u1"),
    "I8": (1, "int8", "i1"),
    "F8_E4M3": (1, "float8_e4m3fn", "u1"),
    "F8_E5M2": (1, "float8_e5m2", "u1"),
    "F16": (2, "float16", "<u2"),
    "BF16": (2, "bfloat16", "<u2"),
    "F8_E8M0": (1, "float8_e8m0fnu", "u1"),
    "U16": (2, "uint16", "<u2"),
    "U32": (4, "uint32", "<u4"),
    "U64": (8, "uint64", "<u8"),
    "I16": (2, "int16", "<i2"),
    "I32": (4, "int32", "<i4"),
    "F32": (4, "float32", "<f4"),
    "I64": (8, "int64", "<i8"),
    "F64": (8, "float64", "<f8"),
}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a safetensors file: dtype name, shape and byte range of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row along the first dimension (the whole tensor for a scalar)."""
        return self.nbytes // self.shape[0] if self.shape and self.shape[0] else self.nbytes


class SafetensorsFile:
    """One safetensors file. Opening reads and checks the header only.

    Raises:
        CheckpointError: the file is unreadable, truncated or its header lies (names the file and the tensor).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("rb")
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be opened ({error.strerror})") from None
        try:
            self.tensors, self.metadata = _read_header(path, self._file)
        except OSError as error:  # a failing disk, a network folder that went away
            self._file.close()
            raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        self._file.close()

    def drop_prefix(self, prefix: str) -> None:
        """Leave a prefix out of the names of the tensors that have it."""
        renamed = ((name.removeprefix(prefix), tensor) for name, tensor in self.tensors.items())
        self.tensors = {name: replace(tensor, name=name) for name, tensor in renamed}

    def bytes_of(self, name: str, start: int = 0, stop: int | None = None) -> bytearray:
        """A copy of bytes [start, stop) of a tensor's data."""
        tensor = self.tensors[name]
        stop = tensor.nbytes if stop is None else stop
        data = bytearray(stop - start)
        try:
            self._file.seek(tensor.begin + start)
            got = self._file.readinto(data)
        except (OSError, ValueError) as error:  # ValueError: closed
            raise CheckpointError(f"{self.path}: {name} cannot be read ({error}); download the file again") from None
        if got != len(data):
            raise CheckpointError(f"{self.path}: {name}: the file has shrunk since it was opened; download it again")
        return data

    def read_array(
        self, name: str, start: int = 0, stop: int | None = None, *, check: Callable[[bytearray], None] | None = None
    ) -> NDArray[Any]:
        """Rows [start, stop) of a tensor; the result owns its memory.

        16-bit and 8-bit floats come as their bit patterns, uint16 and uint8. `check` sees the raw bytes first, and may
        raise.
        """
        import numpy as np

        tensor = self.tensors[name]
        rows = tensor.shape[0] if tensor.shape else 1
        stop = rows if stop is None else stop
        data = self.bytes_of(name, start * tensor.row_bytes, stop * tensor.row_bytes)
        if check is not None:
            check(data)
        shape = (stop - start, *tensor.shape[1:]) if tensor.shape else ()
        array: NDArray[Any] = np.frombuffer(data, dtype=_DTYPES[tensor.dtype][2]).reshape(shape)
        return array

    def read(
        self, name: str, start: int = 0, stop: int | None = None, *, check: Callable[[bytearray], None] | None = None
    ) -> torch.Tensor:
        """`read_array` as a tensor of the stored dtype."""
        import torch

        return torch.from_numpy(self.read_array(name, start, stop, check=check)).view(
            getattr(torch, _DTYPES[self.tensors[name].dtype][1])
        )


def _read_header(path: Path, file: BinaryIO) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    size = os.fstat(file.fileno()).st_size
    start = file.read(512)
    file.seek(8)
    prefix = start[:8]
    if len(prefix) < 8:
        raise CheckpointError(f"{path}: {size} bytes are too few for a safetensors file; download it again")
    (length,) = struct.unpack("<Q", prefix)
    if prefix.startswith(_PICKLE_STARTS) and 8 + length > size:
        raise CheckpointError(f"{path}: looks like a pickle, which kbit never loads: download a safetensors file")
    if length > MAX_HEADER_BYTES:
        refuse_file(path, start)
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(f"{path}: its header would be {length} bytes long: not a safetensors file")
    if 8 + length > size:
        raise CheckpointError(
            f"{path}: truncated: the header needs {8 + length} bytes, the file has {size}; download it again"
        )
    try:
        header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not valid JSON ({error}); download the file again") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is not a JSON object; download the file again")
    metadata = header.pop("__metadata__", {})
    data_start, data_bytes = 8 + length, size - 8 - length
    tensors = {name: _checked_entry(path, name, entry, data_start, data_bytes) for name, entry in header.items()}
    position, previous = data_start, "the header"
    for tensor in sorted(tensors.values(), key=lambda t: (t.begin, t.end)):
        if tensor.begin < position:
            raise CheckpointError(f"{path}: {tensor.name} overlaps {previous}; the file is damaged or hostile")
        if tensor.begin > position:
            raise CheckpointError(
                f"{path}: {tensor.begin - position} unaccounted bytes before {tensor.name}; the file is damaged"
            )
        position, previous = tensor.end, tensor.name
    if position != size:
        raise CheckpointError(f"{path}: {size - position} bytes after the last tensor; the file is damaged")
    return tensors, metadata if isinstance(metadata, dict) else {}


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"{key!r} appears twice")
            seen.add(key)
    return result


def _checked_entry(path: Path, name: str, entry: Any, data_start: int, data_bytes: int) -> StoredTensor:
    if len(name) > _MAX_NAME or not name.isprintable():
        raise CheckpointError(f"{path}: {name[:80]!r} is no name for a tensor; the file is damaged or hostile")
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise CheckpointError(f"{path}: {name}: header entry lacks dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise UnsupportedError(f"{path}: {name} has dtype {str(dtype)[:40]!r}; kbit reads {', '.join(_DTYPES)}")
    if not _natural_numbers(shape) or len(shape) > 8:
        raise CheckpointError(f"{path}: {name} has the impossible shape {str(shape)[:80]}")
    if not _natural_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{path}: {name} has the impossible data_offsets {str(offsets)[:80]}")
    begin, end = offsets
    if end > data_bytes:
        raise CheckpointError(
            f"{path}: {name} ends at byte {end} of {data_bytes}: the file is truncated; download it again"
        )
    # Zeros aside: a shape like (2^62, 2^62, 0) has no bytes, but torch cannot make a tensor of it.
    if prod(dim for dim in shape if dim) >= 2**63:
        raise CheckpointError(f"{path}: {name} has the impossible shape {str(shape)[:80]}")
    nbytes = _DTYPES[dtype][0] * prod(shape)
    if nbytes != end - begin:
        raise CheckpointError(f"{path}: {name} is {dtype} {tuple(shape)} = {nbytes} bytes, but spans {end - begin}")
    return StoredTensor(name, dtype, tuple(shape), data_start + begin, data_start + end)


def _natural_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)
