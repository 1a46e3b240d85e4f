"""GGUF headers (versions 2 and 3, little endian), parsed quickly and without trusting them.

Why not `gguf.GGUFReader`: it makes a numpy view for every string of the vocabulary, which takes a hundred times as
long (docs/measurements.md), and it believes what the header says about lengths, offsets and shapes. This parser steps
over arrays, decodes a value only when it is asked for, and checks every number against the file before using it.
Nothing but the standard library is imported.

Layout (ggml, docs/gguf.md): magic "GGUF", version u32, tensor count u64, key count u64; then the keys (string
key, type u32, value), then the tensor table (string name, n_dims u32, dims u64 x n_dims innermost first,
ggml type u32, offset u64 relative to the data section), padding to `general.alignment`, tensor data. A string is
u64 length + UTF-8; an array is element type u32 + count u64 + elements.
"""

from __future__ import annotations

import os
from pathlib import Path
from struct import Struct
from typing import NoReturn

from kbit.checkpoint.foreign import refuse_file
from kbit.checkpoint.gguf.metadata import DAMAGED, Entry, GGUFHeader, GGUFTensor, quoted
from kbit.checkpoint.gguf.types import (
    ARRAY,
    GGML_TYPES,
    REMOVED_GGML_TYPES,
    SCALARS,
    STRING,
    VALUE_TYPE_NAMES,
    GGMLType,
)
from kbit.host.errors import CheckpointError, UnsupportedError

# Real headers are a few MB (the largest known vocabularies: about 20 MB); the limits only stop files made to
# exhaust memory or time.
MAX_HEADER_BYTES = 256 << 20
# How much of a file is read to find the end of its header, and if that is not all of it, how much next.
_READ_BYTES = (4 << 20, 32 << 20, MAX_HEADER_BYTES)
MAX_KEYS = 65_536
MAX_TENSORS = 1 << 20
MAX_ARRAY_ITEMS = 1 << 24
MAX_NESTING = 4
MAX_NAME_BYTES = 65_535
MAX_ALIGNMENT = 1 << 20
MAX_DIMS = 4

_DEFAULT_ALIGNMENT = 32
_U32 = Struct("<I")
_U64 = Struct("<Q")
_PREFIX = Struct("<4sIQQ")


def read_header(path: Path) -> GGUFHeader:
    """Parse the header of a GGUF file.

    Raises:
        CheckpointError: unreadable, truncated or inconsistent (one line: file, key or tensor, value, remedy).
        UnsupportedError: a GGUF version, byte order or tensor type that kbit does not read.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                raise CheckpointError(f"{path}: the file is empty; download it again")
            # How long a header is shows only while it is parsed. It is not mapped: a file that shrinks meanwhile would
            # end the process (SIGBUS).
            for length in _READ_BYTES:
                file.seek(0)
                try:
                    return _Parser(file.read(length), path, size).parse()
                except _MoreNeeded:
                    continue
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read the file ({error.strerror or error})") from error
    raise CheckpointError(f"{path}: the file changed while it was read; run the command again")


def parse_header(data: bytes, path: Path) -> GGUFHeader:
    """Parse a whole GGUF file held in `data`; see read_header."""
    return _Parser(data, path, len(data)).parse()


class _MoreNeeded(Exception):
    """The header goes on behind what was read of the file."""


class _Parser:
    """One pass over a header. `pos` is the next unread byte; every step checks it against the end of what was read.

    Args:
        data: the beginning of the file.
        path: the file, for errors.
        size: of the whole file.
    """

    def __init__(self, data: bytes, path: Path, size: int) -> None:
        self.data = data
        self.path = path
        self.size = size
        self.end = min(len(data), MAX_HEADER_BYTES)
        self.pos = 0
        self.items_left = MAX_ARRAY_ITEMS

    def fail(self, problem: str, remedy: str = DAMAGED) -> NoReturn:
        raise CheckpointError(f"{self.path}: {problem}; {remedy}")

    def unsupported(self, problem: str) -> NoReturn:
        raise UnsupportedError(f"{self.path}: {problem}")

    def advance(self, nbytes: int, what: str) -> int:
        """Step over `nbytes` and return where they start."""
        start = self.pos
        if nbytes > self.end - start:
            if self.end < min(self.size, MAX_HEADER_BYTES):
                raise _MoreNeeded
            if self.end < self.size:
                self.fail(f"the header is larger than {MAX_HEADER_BYTES >> 20} MiB (at {what})")
            self.fail(
                f"truncated inside its header: {what} needs {start + nbytes} bytes, the file has {self.size}",
                "download it again",
            )
        self.pos = start + nbytes
        return start

    def u32(self, what: str) -> int:
        return int(_U32.unpack_from(self.data, self.advance(4, what))[0])

    def u64(self, what: str) -> int:
        return int(_U64.unpack_from(self.data, self.advance(8, what))[0])

    def name(self, what: str) -> str:
        length = self.u64(f"the length of {what}")
        if length > MAX_NAME_BYTES:
            self.fail(f"{what} claims a name of {length} bytes")
        start = self.advance(length, what)
        try:
            return self.data[start : start + length].decode("utf-8")
        except UnicodeDecodeError:
            self.fail(f"{what} has a name that is not UTF-8")

    def parse(self) -> GGUFHeader:
        version, n_tensors, n_keys = self.prefix()
        entries: dict[str, Entry] = {}
        for index in range(n_keys):
            key = self.name(f"metadata key {index + 1} of {n_keys}")
            if key in entries:
                self.fail(f"metadata key {quoted(key)} appears twice")
            entries[key] = self.entry(key)
        table = [self.tensor_row(index, n_tensors) for index in range(n_tensors)]
        alignment = self.alignment(entries)
        header_end = self.pos
        data_start = header_end + -header_end % alignment
        tensors = self.place(table, data_start, alignment)
        raw = bytes(self.data[:header_end])
        return GGUFHeader(self.path, raw, self.size, version, alignment, data_start, entries, tensors)

    def prefix(self) -> tuple[int, int, int]:
        magic = bytes(self.data[:4])
        if magic != b"GGUF":
            refuse_file(self.path, bytes(self.data[:512]))
            self.fail(f"not a GGUF file (it starts with {magic!r})", "give a .gguf file or a model folder")
        version = self.u32_at_4()
        if version not in (2, 3):
            if version & 0xFFFF == 0 and version >> 16:
                self.unsupported("a big-endian GGUF file; convert the model again for little-endian machines")
            if version == 1:
                self.unsupported("GGUF version 1 (August 2023); convert the model again with a current converter")
            self.unsupported(f"GGUF version {version}; kbit reads versions 2 and 3")
        start = self.advance(_PREFIX.size, "the file's first 24 bytes")
        _, _, n_tensors, n_keys = _PREFIX.unpack_from(self.data, start)
        # The smallest key takes 8 + 4 + 1 bytes, the smallest tensor row 8 + 4 + 8 + 4 + 8.
        room = self.size - _PREFIX.size
        counts = ((n_keys, 13, MAX_KEYS, "metadata keys"), (n_tensors, 32, MAX_TENSORS, "tensors"))
        for claimed, smallest, most, what in counts:
            if claimed > room // smallest:
                self.fail(
                    f"the header claims {claimed} {what}, more than the file's {self.size} bytes can hold",
                    "the file is truncated or damaged; download it again",
                )
            if claimed > most:  # each becomes a few objects of a hundred bytes
                self.fail(f"the header claims {claimed} {what} (at most {most} in a file)")
        return version, n_tensors, n_keys

    def u32_at_4(self) -> int:
        if len(self.data) < 8:
            self.fail(f"truncated inside its header: 24 bytes needed, the file has {self.size}", "download it again")
        return int(_U32.unpack_from(self.data, 4)[0])

    def entry(self, key: str) -> Entry:
        """Step over one value."""
        what = f"metadata key {quoted(key)}"
        kind = self.u32(what)
        if kind == ARRAY:
            item_type, count = self.u32(what), self.u64(what)
            offset = self.pos
            self.step_over(item_type, count, what, 1)
            return Entry(ARRAY, offset, item_type, count)
        offset = self.pos
        self.step_over(kind, 1, what, 0)
        return Entry(kind, offset)

    def step_over(self, kind: int, count: int, what: str, depth: int) -> None:
        """Advance past `count` elements of type `kind`, `depth` arrays deep."""
        if kind not in VALUE_TYPE_NAMES:
            self.fail(f"{what} has the unknown value type {kind}")
        if count > self.items_left:
            self.fail(f"{what} claims an array of {count} elements (at most {MAX_ARRAY_ITEMS} in a file)")
        self.items_left -= count if depth else 0
        if kind == STRING:
            self.step_over_strings(count, what)
        elif kind == ARRAY:
            if depth >= MAX_NESTING:
                self.fail(f"{what} nests arrays more than {MAX_NESTING} deep")
            for _ in range(count):
                item_type, length = self.u32(what), self.u64(what)
                self.step_over(item_type, length, what, depth + 1)
        else:
            self.advance(count * SCALARS[kind].size, what)

    def step_over_strings(self, count: int, what: str) -> None:
        # A vocabulary has up to half a million strings: a plain loop with one comparison per string.
        data, pos, last = self.data, self.pos, self.end - 8
        unpack = _U64.unpack_from
        for _ in range(count):
            if pos > last:
                pos += 8  # the next length field lies outside the file: let advance() say so
                break
            pos += unpack(data, pos)[0] + 8
        self.advance(pos - self.pos, what)

    def tensor_row(self, index: int, n_tensors: int) -> tuple[str, tuple[int, ...], GGMLType, int]:
        """One row of the tensor table: name, shape (outermost first), type, offset from the data section."""
        name = self.name(f"tensor {index + 1} of {n_tensors}")
        what = f"tensor {quoted(name)}"
        n_dims = self.u32(what)
        if not 1 <= n_dims <= MAX_DIMS:
            self.fail(f"{what} claims {n_dims} dimensions (1 to {MAX_DIMS} are possible)")
        dims = tuple(self.u64(what) for _ in range(n_dims))
        number, offset = self.u32(what), self.u64(what)
        if 0 in dims:
            self.fail(f"{what} has a dimension of 0 (shape {dims[::-1]})")
        numel = 1
        for dim in dims:
            numel *= dim
        if numel >= 1 << 60:
            self.fail(f"{what} claims the absurd shape {dims[::-1]}")
        if number in REMOVED_GGML_TYPES:
            self.unsupported(
                f"{what} has the type {REMOVED_GGML_TYPES[number]} that GGUF no longer has; convert the model again"
            )
        kind = GGML_TYPES.get(number)
        if kind is None:
            self.unsupported(f"{what} has the unknown type number {number}; this kbit knows {len(GGML_TYPES)} types")
        if dims[0] % kind.block:
            self.fail(f"{what} has rows of {dims[0]} values, not a multiple of {kind.name}'s block of {kind.block}")
        return name, dims[::-1], kind, offset

    def alignment(self, entries: dict[str, Entry]) -> int:
        entry = entries.get("general.alignment")
        if entry is None:
            return _DEFAULT_ALIGNMENT
        if entry.type != 4:
            self.fail(f"metadata key 'general.alignment' should be uint32, but is {VALUE_TYPE_NAMES[entry.type]}")
        value = int(_U32.unpack_from(self.data, entry.offset)[0])
        if not 1 <= value <= MAX_ALIGNMENT or value & (value - 1):
            self.fail(f"general.alignment is {value}, not a power of two up to {MAX_ALIGNMENT}")
        return value

    def place(
        self, table: list[tuple[str, tuple[int, ...], GGMLType, int]], data_start: int, alignment: int
    ) -> dict[str, GGUFTensor]:
        """Turn relative offsets into absolute ones and check them against the file and each other."""
        tensors: dict[str, GGUFTensor] = {}
        for name, shape, kind, offset in table:
            if name in tensors:
                self.fail(f"tensor {quoted(name)} appears twice")
            if offset % alignment:
                self.fail(f"tensor {quoted(name)} starts at offset {offset}, not a multiple of {alignment}")
            numel = 1
            for dim in shape:
                numel *= dim
            tensors[name] = GGUFTensor(name, shape, kind, data_start + offset, numel // kind.block * kind.block_bytes)
        ordered = sorted(tensors.values(), key=lambda tensor: tensor.offset)
        previous: GGUFTensor | None = None
        for tensor in ordered:
            if previous is not None and previous.offset + previous.nbytes > tensor.offset:
                self.fail(f"tensors {quoted(previous.name)} and {quoted(tensor.name)} overlap")
            previous = tensor
        if previous is not None and previous.offset + previous.nbytes > self.size:
            expected = previous.offset + previous.nbytes
            self.fail(
                f"truncated: {expected} bytes expected (to the end of tensor {quoted(previous.name)}), "
                f"{self.size} found",
                "download it again",
            )
        return tensors
