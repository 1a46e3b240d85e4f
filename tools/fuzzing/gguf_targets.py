"""GGUF files as models, written from a description, so that changes reach what lies behind the header."""

from __future__ import annotations

import struct
from random import Random
from typing import Any

import numpy as np

from fuzzing.mutations import mutate_bytes
from fuzzing.target import JsonTarget, Target
from kbit.checkpoint.gguf.blocks import BLOCK_TYPES
from kbit.checkpoint.gguf.source import GGUFSource
from kbit.checkpoint.gguf.types import GGML_TYPES
from kbit.host.errors import KbitError
from kbit.models.canonical import canonical
from kbit.models.families import spec_from_config
from kbit.text.tokenizer import Tokenizer

# Formats of the types of values, by number (docs/gguf.md); 8: text, 9: array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_MOST_DATA = 1 << 16


class GGUFModel(JsonTarget):
    """A whole file: {"keys": [[name, type, value] ..], "tensors": [[name, type, dims] ..]}; opened, its configuration
    understood, its tokenizer built, its tensors read."""

    longest = 1 << 15
    values = ("llama", "qwen2", "gemma3", "gpt2", "bert", "t5", "deepseek2", "token_embd.weight", "output.weight")

    def run(self, data: bytes) -> None:
        import json

        try:
            content = written(json.loads(data))
        except (ValueError, TypeError, LookupError, RecursionError, OverflowError, struct.error, AttributeError):
            return  # no description of a file
        path = self.scratch / "model.gguf"
        path.write_bytes(content)
        with GGUFSource(path) as opened:
            source = canonical(opened)
            refusal = None
            for step in (
                lambda: spec_from_config(source.config),
                lambda: Tokenizer.from_source(source).encode("Hello, 12 worlds"),
                *(lambda name=name: opened.read_stored(name) for name in opened.tensors),
            ):
                try:
                    step()  # each of them, whatever the ones before thought of the file
                except KbitError as error:
                    refusal = error
            if refusal is not None:
                raise refusal


def written(model: dict[str, Any]) -> bytes:
    """The file that a description describes; tensors of zeros, but for a few bytes."""
    keys, tensors = list(model["keys"]), list(model["tensors"])
    out = bytearray(struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(keys)))
    for name, kind, value in keys:
        out += _text(name) + struct.pack("<I", kind if isinstance(kind, int) else 9) + _value(kind, value)
    begin, places = 0, []
    for name, number, dims in tensors:
        out += _text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, number, begin)
        kind = GGML_TYPES.get(number)
        size = 0 if kind is None else int(np.prod(dims, dtype=float)) // kind.block * kind.block_bytes
        places.append((begin, min(size, _MOST_DATA)))
        begin += -(-size // 32) * 32
    out += b"\0" * (-len(out) % 32)
    data = bytearray(min(begin, _MOST_DATA * len(tensors)))
    for start, size in places:
        data[start : start + min(size, 4)] = b"\x01\x3c\x02\x3c"[: max(0, min(size, 4, len(data) - start))]
    return bytes(out + data)


def _text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(data)) + data


def _value(kind: Any, value: Any) -> bytes:
    """A value of a type's number; of [type], an array of it."""
    if isinstance(kind, list):
        return struct.pack("<IQ", kind[0], len(value)) + b"".join(_value(kind[0], item) for item in value)
    return _text(value) if kind == 8 else struct.pack(f"<{_SCALARS[kind]}", value)


class GGUFBlocks(Target):
    """Bytes as blocks of a type: what is unpacked are codes of the codebook, and values for all of them."""

    longest = 2048

    def run(self, data: bytes) -> None:
        names = sorted(BLOCK_TYPES)
        kind = BLOCK_TYPES[names[data[0] % len(names)]] if data else BLOCK_TYPES[names[0]]
        size = next(each for each in GGML_TYPES.values() if BLOCK_TYPES.get(each.name) is kind)
        whole = (len(data) - 1) // size.block_bytes
        if whole < 1:
            return
        blocks = kind.decode(data[1 : 1 + whole * size.block_bytes], 1, size.block_bytes)
        assert blocks.codes.size == whole * size.block
        assert blocks.codes.max() < len(kind.codebook)
        with np.errstate(all="ignore"):  # scales may be infinite, or no numbers
            assert kind.values(blocks).shape == blocks.codes.shape

    def mutate(self, data: bytes, random: Random) -> bytes:
        return mutate_bytes(data, random) if random.random() < 0.5 else bytes([random.randrange(256)]) + data[1:]
