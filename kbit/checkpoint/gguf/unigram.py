"""Unigram vocabularies in GGUF files (tokenizer model "t5"): scores of pieces, and the table that normalizes texts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from kbit.host.errors import CheckpointError, UnsupportedError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from kbit.checkpoint.gguf.metadata import GGUFHeader

_SPACE = "\u2581"  # SentencePiece's visible space
_UNUSED = 5


def unigram(header: GGUFHeader, tokens: list[str], types: list[int], unknown: int | None) -> Tokenizer:
    """The tokenizer, without its special tokens, as transformers' T5Tokenizer has it.

    Args:
        header: the metadata.
        tokens: by id.
        types: of each.
        unknown: the id of what stands for others.

    Raises:
        CheckpointError: scores that are missing or senseless, a table that is damaged.
        UnsupportedError: texts whose spaces are kept, or that get none before them.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    scores = header.numbers("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens) or not all(map(math.isfinite, scores)):
        header.fail("tokenizer.ggml.scores is not a finite number for each token", "convert the model again")
    if unknown is None:
        header.fail("metadata key 'tokenizer.ggml.unknown_token_id' is missing", "convert the model again")
    for key in ("add_space_prefix", "remove_extra_whitespaces"):
        if header.flag(f"tokenizer.ggml.{key}") is False:
            raise UnsupportedError(f"{header.path}: a unigram vocabulary whose {key} is false is not supported")
    # What no text is made of gets a name that no text has, and a score that does not make unknown letters dearer.
    pairs = list(zip(tokens, scores, types, strict=True))
    least = min((score for _, score, kind in pairs if kind != _UNUSED), default=0.0)
    pieces = [(f"\0{text}", least) if kind == _UNUSED else (text, score) for text, score, kind in pairs]
    try:
        tokenizer = Tokenizer(models.Unigram(pieces, unknown, byte_fallback=False))
        table = header.integers("tokenizer.ggml.precompiled_charsmap")
        if table:
            tokenizer.normalizer = normalizers.Precompiled(bytes(value & 255 for value in table))
    except Exception as error:  # the library's only exception type
        raise CheckpointError(
            f"{header.path}: the unigram vocabulary is not usable ({str(error)[:200]}); convert the model again"
        ) from error
    space = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="always", split=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), space])
    tokenizer.decoder = decoders.Metaspace(replacement=_SPACE, prepend_scheme="always", split=True)
    return tokenizer
