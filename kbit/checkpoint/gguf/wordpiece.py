"""BERT's WordPiece tokenizer from GGUF metadata.

The metadata has "▁" before tokens that begin a word and nothing before those that go on with one, where vocabularies
have nothing and "##"; control tokens are as they were, and so are names in brackets in files from before 2025.
"""

from __future__ import annotations

import json
from typing import Any

from kbit.checkpoint.gguf.metadata import GGUFHeader, quoted
from kbit.host.errors import CheckpointError

_CONTROL, _UNUSED = 3, 5
_SPACE = "\u2581"
_MAX_WORD = 100  # BERT's: a longer word is unknown
# Keys of special tokens ("seperator" is how GGUF spells it), what to take without one, and their usual texts.
_SPECIAL = {
    "cls": (("cls", "bos"), "[CLS]"),
    "sep": (("seperator", "separator", "eos"), "[SEP]"),
    "unk": (("unknown",), "[UNK]"),
    "pad": (("padding",), "[PAD]"),
    "mask": (("mask",), "[MASK]"),
}


def wordpiece_files(header: GGUFHeader, context: int) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json.

    Args:
        header: the parsed header.
        context: the model's context length in tokens.

    Raises:
        CheckpointError: the vocabulary contradicts itself, or has no special tokens.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    stored, types = header.strings("tokenizer.ggml.tokens") or [], header.integers("tokenizer.ggml.token_type") or []
    if not stored or len(types) != len(stored):
        header.fail(f"tokenizer.ggml.token_type has {len(types)} entries for {len(stored)} tokens")
    tokens = [_text(text, kind) for text, kind in zip(stored, types, strict=True)]
    ids = {text: index for index, text in enumerate(tokens)}
    if len(ids) != len(tokens):
        twice = next(text for index, text in enumerate(tokens) if ids[text] != index)
        header.fail(f"token {quoted(twice)} appears twice in the vocabulary")
    special = {name: _special(header, keys, text, tokens, ids) for name, (keys, text) in _SPECIAL.items()}
    for name in ("cls", "sep", "unk"):
        if special[name] is None:
            raise CheckpointError(
                f"{header.path}: the tokenizer has no {_SPECIAL[name][1]}: metadata key "
                f"'tokenizer.ggml.{_SPECIAL[name][0][0]}_token_id' is missing; convert the model again"
            )
    lower = header.flag("tokenizer.ggml.normalizer.lowercase")
    lower = True if lower is None else lower
    accents = header.flag("tokenizer.ggml.normalizer.strip_accents")
    tokenizer = Tokenizer(
        models.WordPiece(vocab=ids, unk_token=str(special["unk"]), max_input_chars_per_word=_MAX_WORD)
    )
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lower, strip_accents=accents)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    named = dict.fromkeys(text for text in special.values() if text is not None)
    control = [text for text, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    tokenizer.add_tokens(
        [AddedToken(text, special=True, normalized=False) for text in dict.fromkeys([*named, *control])]
    )
    begin, end = str(special["cls"]), str(special["sep"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[begin, "$A", end],
        pair=[begin, "$A", end, "$B:1", f"{end}:1"],
        special_tokens=[(begin, ids[begin]), (end, ids[end])],
    )
    config: dict[str, Any] = {"tokenizer_class": "BertTokenizer", "model_max_length": context, "do_lower_case": lower}
    config |= {f"{name}_token": text for name, text in special.items() if text is not None}
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": (json.dumps(config, ensure_ascii=False, indent=2) + "\n").encode(),
    }


def _text(stored: str, kind: int) -> str:
    if kind in (_CONTROL, _UNUSED) or (stored.startswith("[") and stored.endswith("]") and len(stored) > 2):
        return stored
    return stored[1:] if stored.startswith(_SPACE) else f"##{stored}"


def _special(
    header: GGUFHeader, keys: tuple[str, ...], text: str, tokens: list[str], ids: dict[str, int]
) -> str | None:
    for key in keys:
        index = header.token_id(f"tokenizer.ggml.{key}_token_id", len(tokens))
        if index is not None:
            return tokens[index]
    return text if text in ids else None
