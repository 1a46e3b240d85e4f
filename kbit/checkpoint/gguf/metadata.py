"""What a parsed GGUF header offers: the tensor table, and metadata values decoded when asked for."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from struct import Struct
from typing import Any, NoReturn

from kbit.checkpoint.gguf.types import (
    ARRAY,
    BOOL,
    FLOAT_TYPES,
    INTEGER_TYPES,
    SCALAR_CODES,
    SCALARS,
    STRING,
    VALUE_TYPE_NAMES,
    GGMLType,
)
from kbit.host.errors import CheckpointError
from kbit.host.notes import note

# -1, as it reads in the types that writers choose.
_NO_TOKEN = (-1, (1 << 16) - 1, (1 << 32) - 1, (1 << 64) - 1)

DAMAGED = "the file is damaged; download or convert it again"

_U32 = Struct("<I")
_U64 = Struct("<Q")


def quoted(name: str) -> str:
    """A name from a file, safe to print on one line: escaped and cut to 80 characters."""
    return repr(name if len(name) <= 80 else name[:77] + "...")


@dataclass(frozen=True)
class GGUFTensor:
    """One row of the tensor table.

    Attributes:
        name: GGUF name, for example "blk.0.attn_q.weight".
        shape: outermost dimension first (the reverse of GGUF's order).
        type: storage type.
        offset: first byte, counted from the start of the file.
        nbytes: bytes of data.
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLType
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Entry:
    """Where a metadata value lies: its type, and for an array the element type and count."""

    type: int
    offset: int
    item_type: int = -1
    count: int = 0


class GGUFHeader:
    """A parsed header: typed access to the metadata, and the tensor table.

    Attributes:
        path: the file.
        version: 2 or 3.
        file_size: bytes of the whole file.
        alignment: alignment of tensor data in bytes.
        data_start: first byte of the data section.
        tensors: the tensor table by GGUF name, in file order.
        raw: the header's bytes, from the magic to the end of the tensor table.

    The accessors (`string`, `integer`, ...) return None for an absent key and raise CheckpointError, naming the
    file and the key, for a value of another type.
    """

    def __init__(
        self, path: Path, raw: bytes, file_size: int, version: int, alignment: int, data_start: int,
        entries: dict[str, Entry], tensors: dict[str, GGUFTensor],
    ) -> None:  # fmt: skip
        self.path = path
        self.raw = raw
        self.file_size = file_size
        self.version = version
        self.alignment = alignment
        self.data_start = data_start
        self.tensors = tensors
        self._entries = entries

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[str]:
        """All metadata keys, in file order."""
        return iter(self._entries)

    def fail(self, problem: str, remedy: str = DAMAGED) -> NoReturn:
        """Raise CheckpointError about this file."""
        raise CheckpointError(f"{self.path}: {problem}; {remedy}")

    def type_of(self, key: str) -> str:
        """The stored type in words, for example "uint32" or "array of string"."""
        entry = self._entries[key]
        name = VALUE_TYPE_NAMES[entry.type]
        return f"array of {VALUE_TYPE_NAMES[entry.item_type]}" if entry.type == ARRAY else name

    def count(self, key: str) -> int:
        """Number of elements of an array (0 for anything else or an absent key); decodes nothing."""
        entry = self._entries.get(key)
        return entry.count if entry is not None else 0

    def value(self, key: str) -> Any:
        """Any value as Python objects (arrays as lists), or None when the key is absent."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        if entry.type == ARRAY:
            return self._items(key, entry.item_type, entry.count, entry.offset)[0]
        return self._items(key, entry.type, 1, entry.offset)[0][0]

    def typed(self, key: str) -> tuple[int | tuple[int, int], Any]:
        """A value with its type: the number of that, or of an array those of array and items.

        Raises:
            CheckpointError: an array of arrays.
        """
        entry = self._entries[key]
        if entry.type == ARRAY and entry.item_type == ARRAY:
            self.fail(f"metadata key {quoted(key)} is an array of arrays", "kbit does not copy such keys")
        return (ARRAY, entry.item_type) if entry.type == ARRAY else entry.type, self.value(key)

    def string(self, key: str) -> str | None:
        """A string value."""
        value: str | None = self._checked(key, frozenset({STRING}), "a string")
        return value

    def integer(self, key: str) -> int | None:
        """An integer value of any width."""
        value: int | None = self._checked(key, INTEGER_TYPES, "an integer")
        return value

    def token_id(self, key: str, tokens: int) -> int | None:
        """The id of a token, or None; an id that stands for "none" is told as a note.

        Writers have several: -1 in whatever type (4294967295), and the size of the vocabulary, padded or not.

        Args:
            key: its key.
            tokens: size of the vocabulary.
        """
        value = self.integer(key)
        if value is None or 0 <= value < tokens:
            return value
        embedding = self.tensors.get("token_embd.weight")
        if value not in _NO_TOKEN and value != tokens and (embedding is None or value != embedding.shape[0]):
            self.fail(f"metadata key {quoted(key)} is {value}, outside 0 to {tokens - 1}")
        note(f"{self.path}: metadata key {quoted(key)} is {value}, which no token has: taken as none")
        return None

    def number(self, key: str) -> float | None:
        """A floating-point or integer value."""
        value = self._checked(key, FLOAT_TYPES | INTEGER_TYPES, "a number")
        return None if value is None else float(value)

    def flag(self, key: str) -> bool | None:
        """A boolean value."""
        value: bool | None = self._checked(key, frozenset({BOOL}), "true or false")
        return value

    def strings(self, key: str) -> list[str] | None:
        """An array of strings."""
        values: list[str] | None = self._checked_array(key, frozenset({STRING}), "an array of strings")
        return values

    def integers(self, key: str) -> list[int] | None:
        """An array of integers."""
        values: list[int] | None = self._checked_array(key, INTEGER_TYPES, "an array of integers")
        return values

    def numbers(self, key: str) -> list[float] | None:
        """An array of floating-point numbers."""
        values: list[float] | None = self._checked_array(key, FLOAT_TYPES, "an array of floats")
        return values

    def _checked(self, key: str, types: frozenset[int], wanted: str) -> Any:
        entry = self._entries.get(key)
        if entry is None:
            return None
        if entry.type not in types:
            self.fail(f"metadata key {quoted(key)} should be {wanted}, but is stored as {self.type_of(key)}")
        return self.value(key)

    def _checked_array(self, key: str, types: frozenset[int], wanted: str) -> Any:
        entry = self._entries.get(key)
        if entry is None:
            return None
        # Converters write an empty array with any element type.
        if entry.type != ARRAY or (entry.item_type not in types and entry.count):
            self.fail(f"metadata key {quoted(key)} should be {wanted}, but is stored as {self.type_of(key)}")
        return self.value(key)

    def _items(self, key: str, kind: int, count: int, pos: int) -> tuple[list[Any], int]:
        """`count` elements of type `kind` from `pos` (inside the header: the parser stepped over them)."""
        if kind == STRING:
            strings: list[Any] = []
            for _ in range(count):
                (size,) = _U64.unpack_from(self.raw, pos)
                pos += 8 + size
                strings.append(self.raw[pos - size : pos])
            try:
                return [text.decode("utf-8") for text in strings], pos
            except UnicodeDecodeError as error:
                self.fail(f"metadata key {quoted(key)} holds a string that is not UTF-8 ({error.reason})")
        if kind == ARRAY:
            lists: list[Any] = []
            for _ in range(count):
                (item_type,) = _U32.unpack_from(self.raw, pos)
                (length,) = _U64.unpack_from(self.raw, pos + 4)
                items, pos = self._items(key, item_type, length, pos + 12)
                lists.append(items)
            return lists, pos
        values = list(struct.unpack_from(f"<{count}{SCALAR_CODES[kind]}", self.raw, pos))
        if kind == BOOL:
            if any(value > 1 for value in values):
                self.fail(f"metadata key {quoted(key)} holds a boolean that is neither 0 nor 1")
            values = [value == 1 for value in values]
        return values, pos + count * SCALARS[kind].size
