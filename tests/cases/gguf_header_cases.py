"""GGUF files byte by byte, right or wrong."""

from __future__ import annotations

import struct
from pathlib import Path

NAME = Path("model.gguf")


def text(value: str) -> bytes:
    """A GGUF string."""
    return struct.pack("<Q", len(value.encode())) + value.encode()


def key(name: str, kind: int, value: bytes) -> bytes:
    """A metadata entry."""
    return text(name) + struct.pack("<I", kind) + value


def array(kind: int, items: list[bytes]) -> bytes:
    return struct.pack("<IQ", kind, len(items)) + b"".join(items)


def row(name: str, dims: tuple[int, ...], kind: int, offset: int) -> bytes:
    """A line of the tensor table; dims innermost first, as in the file."""
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


ARCHITECTURE = key("general.architecture", 8, text("llama"))
TWO_ROWS = [row("a", (8, 4), 0, 0), row("b", (32,), 8, 128)]  # 128 bytes of F32, then one Q8_0 block of 34


def build(
    keys: list[bytes] | None = None,
    rows: list[bytes] | None = None,
    *,
    data: int = 162,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_keys: int | None = None,
    n_tensors: int | None = None,
    order: str = "<",
) -> bytes:
    """A GGUF file; without arguments a valid one with one key and two tensors."""
    keys = [ARCHITECTURE] if keys is None else keys
    rows = TWO_ROWS if rows is None else rows
    counts = (len(rows) if n_tensors is None else n_tensors, len(keys) if n_keys is None else n_keys)
    header = magic + struct.pack(order + "IQQ", version, *counts) + b"".join(keys) + b"".join(rows)
    return header + bytes(-len(header) % 32) + bytes(data)
