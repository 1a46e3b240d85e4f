"""Tokenizer metadata to be written as GGUF, texts, and ids, which the tests of GGUF tokenizers share."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from gguf_file_cases import write_gguf
from tokenizers import pre_tokenizers

from kbit.checkpoint.gguf.header import read_header
from kbit.checkpoint.gguf.tokenizer import sidecars_from_header

TRICKY = [
    "",
    " ",
    "Hello, world!",
    "I'll say it's fine; we've SEEN IT'S don't, they'RE.",
    "  leading, multiple   spaces and trailing   ",
    "digits 1 12 123 1234567 3.14 1,000,000 x86_64 (2024-05-31) ½ ² Ⅷ ٣٤",
    "tabs\tand\t\tmore\n\nblank lines\r\nwindows \n indented",
    "Ünïcödé naïve café déjà vu Ångström Ελληνικά русский עברית العربية हिन्दी 漢字かな交じり文 한국어",
    "emoji 🙂👩‍👩‍👧🏳️‍🌈!? 🇩🇪",
    "def f(x):\n    return {'a': [1, 2]}  # comment\n\n\tpass\n",
    "camelCase HTTPServer iPhone XMLHttpRequest2 ÀÉ",
    "https://example.org/a?b=c&d=e#f <b>tags</b> $x^2+y$ ~|`@",
    "\u00a0non\u3000breaking\u200bzero\ufeff",
]


def random_texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    pieces = [*"ab cZ09 \n\t\r'.,!  é漢字🙂٣²Ⅷſ", "'s", "'LL", " 123", "\u3000", "ing", " the", "<|im_start|>", "</s>"]
    return ["".join(rng.choices(pieces, k=rng.randint(1, 40))) for _ in range(count)]


class Metadata:
    """Tokenizer metadata to be written as a GGUF file (with one tensor of no meaning)."""

    def __init__(self, model: str, tokens: list[str], **keys: Any) -> None:
        self.keys: dict[str, Any] = {"model": model, "tokens": tokens, **keys}
        self.template: str | None = None
        self.named: dict[str, str | None] = {}  # None: listed, but not there

    def write(self, path: Path) -> Path:
        metadata = {f"tokenizer.ggml.{name}": value for name, value in self.keys.items() if value is not None}
        if self.template is not None:
            metadata["tokenizer.chat_template"] = self.template
        if self.named:
            metadata["tokenizer.chat_templates"] = list(self.named)
            metadata |= {
                f"tokenizer.chat_template.{name}": text for name, text in self.named.items() if text is not None
            }
        return write_gguf(path, "llama", metadata, {})

    def sidecars(self, folder: Path) -> dict[str, bytes]:
        return sidecars_from_header(read_header(self.write(folder / "t.gguf")), 2048)

    def tokenizer(self, folder: Path) -> tokenizers.Tokenizer:
        return tokenizers.Tokenizer.from_buffer(self.sidecars(folder)["tokenizer.json"])


def byte_level(pre: str | None = "gpt-2", **keys: Any) -> Metadata:
    """A small byte-level vocabulary: the 256 bytes, some English merges, and a few special tokens at the end."""
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = []
    for merge in (
        "Ġ t", "h e", "Ġt he", "i n", "in g", "Ġ Ġ", "ĠĠ ĠĠ", "1 2", "12 3", "Ċ Ċ", "Ġ 1", "Ã ©", "' s", "' L", ". ,",
    ):  # fmt: skip
        tokens.append(merge.replace(" ", ""))
        merges.append(merge)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool>"]
    types = [1] * len(tokens) + [3, 3, 3, 4]
    first = len(tokens)
    keys = {"bos_token_id": first + 1, "eos_token_id": first + 2, "pre": pre, **keys}
    return Metadata("gpt2", [*tokens, *special], token_type=types, merges=merges, **keys)


def through_transformers(path: Path) -> Any:
    """transformers' own conversion of a GGUF file's tokenizer."""
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)


def their_ids(theirs: Any, text: str) -> list[int]:
    return list(theirs(text, add_special_tokens=False)["input_ids"])


def our_ids(ours: tokenizers.Tokenizer, text: str, special: bool = False) -> list[int]:
    return list(ours.encode(text, add_special_tokens=special).ids)
