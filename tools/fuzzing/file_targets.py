"""Headers of safetensors and GGUF files."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from random import Random

from fuzzing.mutations import mutate_bytes, mutate_json
from fuzzing.target import Target
from kbit.checkpoint.gguf.header import parse_header
from kbit.checkpoint.readers.safetensors_file import SafetensorsFile

_DTYPES = ("F32", "F16", "BF16", "F64", "I8", "U8", "I32", "I64", "BOOL", "F8_E4M3", "F4", "Q4_K", "f32")


class Safetensors(Target):
    """A safetensors file: opened, and every tensor read."""

    words = tuple(f'"{word}"'.encode() for word in (*_DTYPES, "dtype", "shape", "data_offsets", "__metadata__"))

    def run(self, data: bytes) -> None:
        path = self.scratch / "model.safetensors"
        path.write_bytes(data)
        file = SafetensorsFile(path)
        try:
            for name in file.tensors:
                file.read_array(name)
        finally:
            file.close()

    def mutate(self, data: bytes, random: Random) -> bytes:
        return mutate_safetensors(data, random, self.words)


def mutate_safetensors(data: bytes, random: Random, words: tuple[bytes, ...] = ()) -> bytes:
    """A file with another header, whose length is right, or with a few other bytes."""
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length])
    except (ValueError, RecursionError, OverflowError):
        header = None
    if header is None or random.random() < 0.3:
        return mutate_bytes(data, random, words)
    text = json.dumps(mutate_json(header, random, _DTYPES)).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


class GGUFHeaderBytes(Target):
    """A GGUF header: parsed, and every value of its metadata read."""

    words = (b"GGUF", b"general.alignment", b"general.architecture", *(struct.pack("<I", n) for n in range(14)))

    def run(self, data: bytes) -> None:
        header = parse_header(data, Path("model.gguf"))
        for key in header:
            header.typed(key)
