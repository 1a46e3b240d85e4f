"""SentencePiece models written by hand, and tokenizers of Marian and M2M-100 made of them."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

SPACE = "\u2581"
WORDS = ["the", "cat", "s", "at", "sat", "on", "ma", "t", "mat", "a", "c"]


def _varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def _field(number: int, value: int | bytes | float) -> bytes:
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def model_file(
    pieces: Sequence[tuple[str, float]],
    *,
    kind: int = 1,
    normalizer: Mapping[int, int] | None = None,
    unknown: int = 0,
) -> bytes:
    """A model; what stands before the unknown piece are control pieces."""
    types = [3] * unknown + [2] + [1] * (len(pieces) - unknown - 1)
    data = b"".join(
        _field(1, _field(1, text.encode()) + _field(2, float(score)) + _field(3, type_))
        for (text, score), type_ in zip(pieces, types, strict=True)
    )
    data += _field(2, _field(3, kind) + _field(40, unknown))
    return data + _field(3, b"".join(_field(n, v) for n, v in (normalizer or {}).items()))


def pieces_of(words: Sequence[str] = WORDS) -> list[tuple[str, float]]:
    """Words with and without a space before them, with scores in which long ones are worth it."""
    texts = [f"{SPACE}{word}" for word in words] + list(words) + [SPACE]
    return [("<unk>", 0.0), *((text, -1.0 - 0.37 * index) for index, text in enumerate(texts))]


def save_t5(folder: Path) -> list[tuple[str, float]]:
    """T5's SentencePiece file; its pieces."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *pieces_of()[1:]]
    (folder / "spiece.model").write_bytes(model_file(pieces, unknown=2))
    return pieces


def save_marian(folder: Path, codes: Sequence[str] = (), size: int = 99) -> dict[str, int]:
    """Files of a Marian tokenizer, whose vocabulary is in another order than its pieces."""
    pieces = pieces_of()
    for name in ("source.spm", "target.spm"):
        (folder / name).write_bytes(model_file(pieces))
    texts = ["</s>", "<unk>", *(f">>{code}<<" for code in codes), *reversed([text for text, _ in pieces[1:]])]
    texts += [f"unused{index}" for index in range(size - 1 - len(texts))] + ["<pad>"]
    vocabulary = {text: index for index, text in enumerate(texts)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    about = {"tokenizer_class": "MarianTokenizer", "source_lang": "en", "target_lang": "de", "separate_vocabs": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return vocabulary


def save_m2m(folder: Path, codes: Sequence[str] = ("en", "de", "fr")) -> dict[str, int]:
    """Files of an M2M-100 tokenizer, whose languages' ids follow the vocabulary's."""
    pieces = pieces_of()
    (folder / "sentencepiece.bpe.model").write_bytes(model_file(pieces))
    texts = ["<s>", "<pad>", "</s>", "<unk>", *(text for text, _ in pieces[1:])]
    vocabulary = {text: index for index, text in enumerate(texts)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    tokens = {**special, "additional_special_tokens": [f"__{code}__" for code in codes]}
    (folder / "special_tokens_map.json").write_text(json.dumps(tokens))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "M2M100Tokenizer"}))
    return {**vocabulary, **{f"__{code}__": len(vocabulary) + index for index, code in enumerate(codes)}}
