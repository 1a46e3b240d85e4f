"""Vocabularies of Unigram (T5's) and of WordPiece (BERT's) as GGUF metadata: what `unigram` and `wordpiece` read."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from kbit.checkpoint.gguf.types import ARRAY
from kbit.host.errors import UnsupportedError

if TYPE_CHECKING:
    import tokenizers

    from kbit.checkpoint.gguf.writing import Value

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5
_U8 = 0
_SPACE = "\u2581"
_INSTEAD = "export plain floats with --to safetensors"
_UNUSED_SCORE = -10000.0
_MAX_WORD = 100  # of WordPiece: a longer word is unknown


def token_types(tokenizer: tokenizers.Tokenizer, size: int, unknown: int | None) -> list[int]:
    """The kinds of tokens by id."""
    types = [_NORMAL if tokenizer.id_to_token(index) is not None else _UNUSED for index in range(size)]
    for index, token in tokenizer.get_added_tokens_decoder().items():
        types[index] = _CONTROL if token.special else _USER_DEFINED
    if unknown is not None:
        types[unknown] = _UNKNOWN
    return types


def unigram_keys(tokenizer: tokenizers.Tokenizer, parsed: Mapping[str, Any], size: int, where: str) -> dict[str, Value]:
    """Keys after "tokenizer.ggml." but for ids of special tokens.

    Args:
        tokenizer: with all its added tokens.
        parsed: its tokenizer.json.
        size: tokens of the model's vocabulary.
        where: the checkpoint, for errors.

    Raises:
        UnsupportedError: it normalizes by what there is no key for.
    """
    model = parsed["model"]
    steps = [step for step in _steps(parsed["normalizer"]) if step["type"] != "Precompiled"]
    if steps or model.get("byte_fallback"):
        what = f"normalizes by {steps[0]['type']}" if steps else "has bytes as tokens"
        raise UnsupportedError(f"{where}: kbit writes no Unigram tokenizer that {what} as GGUF; {_INSTEAD}")
    scores = [float(score) for _, score in model["vocab"]]
    keys: dict[str, Value] = {
        "model": "t5",
        "pre": "default",
        "tokens": [tokenizer.id_to_token(index) or f"[PAD{index}]" for index in range(size)],
        "scores": (scores + [_UNUSED_SCORE] * (size - len(scores)))[:size],
        "token_type": token_types(tokenizer, size, model["unk_id"]),
        "add_space_prefix": True,
        "remove_extra_whitespaces": True,
    }
    tables = [step["precompiled_charsmap"] for step in _steps(parsed["normalizer"])]
    if tables:
        keys["precompiled_charsmap"] = ((ARRAY, _U8), list(base64.b64decode(tables[0])))
    return keys


def wordpiece_keys(
    tokenizer: tokenizers.Tokenizer, parsed: Mapping[str, Any], size: int, types: int, where: str
) -> dict[str, Value]:
    """Likewise, of WordPiece.

    Args:
        types: how many kinds of tokens the model tells apart.
    """
    normalizer, model = parsed["normalizer"] or {}, parsed["model"]
    usual = {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True}
    splits = (parsed["pre_tokenizer"] or {}).get("type")
    odd = [key for key, value in usual.items() if normalizer.get(key) != value]
    odd += [] if splits == "BertPreTokenizer" else ["pre_tokenizer"]
    usual_model = {"continuing_subword_prefix": "##", "max_input_chars_per_word": _MAX_WORD}
    odd += [key for key, value in usual_model.items() if model.get(key) != value]
    if odd:
        raise UnsupportedError(
            f"{where}: kbit writes WordPiece tokenizers that are BERT's as GGUF, and {odd[0]} of this one is not; "
            f"{_INSTEAD}"
        )
    kinds = token_types(tokenizer, size, None)
    tokens = []
    for index, kind in enumerate(kinds):
        text = tokenizer.id_to_token(index) or f"[PAD{index}]"
        whole = kind in (_CONTROL, _UNUSED) or (text.startswith("[") and text.endswith("]") and len(text) > 2)
        tokens.append(text if whole else text[2:] if text.startswith("##") else _SPACE + text)
    keys: dict[str, Value] = {"model": "bert", "pre": "default", "tokens": tokens, "token_type": kinds}
    keys |= {"token_type_count": max(types, 1), "normalizer.lowercase": bool(normalizer["lowercase"])}
    if normalizer["strip_accents"] is not None:
        keys["normalizer.strip_accents"] = bool(normalizer["strip_accents"])
    return keys


def _steps(part: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    if part is not None:
        yield from part["normalizers"] if part["type"] == "Sequence" else [part]
