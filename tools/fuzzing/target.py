"""What is fuzzed: a target takes bytes, and either does its work or raises an error that kbit means to raise."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any

from fuzzing.mutations import mutate_bytes, mutate_json
from kbit.host.errors import KbitError

CORPUS = Path(__file__).resolve().parent / "corpus"

# Name -> module and class. Loaded one at a time: what a target imports is instrumented while it is imported.
TARGETS: Mapping[str, tuple[str, str]] = {
    "safetensors": ("file_targets", "Safetensors"),
    "gguf-header": ("file_targets", "GGUFHeaderBytes"),
    "gguf-model": ("gguf_targets", "GGUFModel"),
    "gguf-blocks": ("gguf_targets", "GGUFBlocks"),
    "config": ("config_targets", "Config"),
    "generation": ("config_targets", "Generation"),
    "tokenizer": ("text_targets", "TokenizerFiles"),
    "sentencepiece": ("text_targets", "SentencePiece"),
    "template": ("text_targets", "Template"),
    "manifest": ("folder_targets", "Manifest"),
    "packed": ("folder_targets", "Packed"),
    "http": ("http_target", "Http"),
    "native": ("native_target", "Native"),
}


class Target(ABC):
    """One thing that reads what strangers write.

    Attributes:
        longest: bytes of an input at most.
        words: pieces of the format, which mutations put in.
        allowed: errors that are right answers to wrong input.
        frugal: whether an input may not take much memory.
    """

    longest = 4096
    words: tuple[bytes, ...] = ()
    allowed: tuple[type[BaseException], ...] = (KbitError,)
    frugal = True

    def __init__(self, scratch: Path) -> None:
        """scratch: an empty folder for files that the target writes."""
        self.scratch = scratch

    @abstractmethod
    def run(self, data: bytes) -> None:
        """Gives the input to kbit. Raises what kbit raises."""

    def mutate(self, data: bytes, random: Random) -> bytes:
        """Another input, near this one."""
        return mutate_bytes(data, random, self.words)

    def close(self) -> None:
        """Ends what runs beside the target."""


class JsonTarget(Target):
    """A target whose inputs are JSON texts; others are read as well as they can be."""

    # What values are replaced with, beside those of every JSON text.
    values: tuple[Any, ...] = ()

    def mutate(self, data: bytes, random: Random) -> bytes:
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            return mutate_bytes(data, random, self.words)
        if random.random() < 0.1:
            return mutate_bytes(data, random, self.words)
        for _ in range(1 + int(random.expovariate(1.0))):
            value = mutate_json(value, random, self.values)
        return json.dumps(value).encode("utf-8", "surrogatepass")


def load_target(name: str, scratch: Path) -> Target:
    """A target, ready to run. KeyError: there is none of this name."""
    module, attribute = TARGETS[name]
    target: Target = getattr(import_module(f"fuzzing.{module}"), attribute)(scratch)
    return target


def corpus(name: str) -> list[bytes]:
    """The inputs of a target that are kept: each file is one, each line of a .jsonl file is one."""
    found: list[bytes] = []
    for path in sorted((CORPUS / name).glob("*")):
        data = path.read_bytes()
        found += data.splitlines() if path.suffix == ".jsonl" else [data]
    return found


def split_head(data: bytes) -> tuple[Any, bytes]:
    """An input of two parts: the JSON of its first line, {} where there is none, and the bytes behind it."""
    line, _, rest = data.partition(b"\n")
    try:
        return json.loads(line), rest
    except (ValueError, RecursionError):
        return {}, rest


def join_head(head: Any, rest: bytes) -> bytes:
    """The input that `split_head` takes apart."""
    return json.dumps(head).encode("utf-8", "surrogatepass") + b"\n" + rest
