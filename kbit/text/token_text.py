"""How single tokens are shown: their text, and the bytes they stand for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from kbit.text.detokenizer import REPLACEMENT

if TYPE_CHECKING:
    from kbit.text.tokenizer import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """The bytes of a token, a part of a character possibly; b"" for an id that no token has."""
    text = tokenizer.decode([token], skip_special_tokens=False)
    name = tokenizer.token_name(token) or ""
    if name.startswith("▁"):  # a decoder drops the space that a text begins with: what does it add behind itself?
        text = tokenizer.decode([token, token], skip_special_tokens=False)[len(text) :]
    if REPLACEMENT not in text:
        return text.encode("utf-8", errors="replace")
    single = _BYTE.fullmatch(name)
    if single is not None:
        return bytes([int(single[1], 16)])
    table = _byte_alphabet()
    if all(char in table for char in name):
        return bytes(table[char] for char in name)
    return text.encode("utf-8", errors="replace")


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """The text of a token; of a part of a character "bytes:\\xe2\\x80", as OpenAI writes it."""
    data = token_bytes(tokenizer, token)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def offsets(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[int]:
    """Where in a text the text of each of its tokens begins."""
    stream, at, found = tokenizer.stream(skip_special_tokens=False), 0, []
    for token in tokens:
        found.append(at)
        at += len(stream.push(token))
    return found


@lru_cache(maxsize=1)
def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level tokenizers write bytes as (GPT-2's table: printable ones are themselves)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    return {**table, **{chr(256 + index): byte for index, byte in enumerate(others)}}
