"""Tokenizers of Marian and M2M-100: SentencePiece says what the pieces are, vocab.json which ids they have.

transformers has no fast tokenizer, and with it no tokenizer.json, of these; what is done here is what its
`MarianTokenizer` and `M2M100Tokenizer` do. (Of Marian's, sacremoses' normalisation is used by nothing.)
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kbit.host.errors import CheckpointError, UnsupportedError
from kbit.text.added_tokens import read_json, token_settings, token_strings
from kbit.text.sentencepiece import SentencePieceModel, joined

if TYPE_CHECKING:
    import tokenizers

MARIAN, M2M_100 = "source.spm", "sentencepiece.bpe.model"
_VOCABULARY, _TARGETS = "vocab.json", "target_vocab.json"
# What a text for a Marian model of several languages begins with.
_CODE = re.compile(r">>.*?<<")


def has_pieces(files: Mapping[str, bytes]) -> bool:
    """Whether a checkpoint's tokenizer is one of these."""
    return _VOCABULARY in files and (MARIAN in files or M2M_100 in files)


@dataclass(frozen=True)
class _Encoded:
    ids: list[int]


@dataclass(frozen=True)
class _Special:
    content: str
    special: bool = True


class PieceTokenizer:
    """A `kbit.text.backend.TokenizerBackend`.

    Args:
        files: a checkpoint's sidecar files, for which `has_pieces`.
        where: the checkpoint, for errors.

    Raises:
        CheckpointError: a file is not what its name says.
        UnsupportedError: it segments text in a way that is not known here.
    """

    decoder = None

    def __init__(self, files: Mapping[str, bytes], where: str) -> None:
        self._marian = MARIAN in files
        name = MARIAN if self._marian else M2M_100
        self._pieces: tokenizers.Tokenizer = SentencePieceModel.parse(files[name], f"{where}: {name}").tokenizer()
        self._ids = _vocabulary(files, _VOCABULARY, where)
        settings = token_settings(files, where)
        named = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>", **token_strings(settings)}
        if self._marian:
            named.pop("bos_token", None)  # (not one of these tokenizers')
        else:
            extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
            languages = [text for text in map(_content, extra) if text]
            if not languages:
                raise UnsupportedError(
                    f"{where}: special_tokens_map.json names no languages (additional_special_tokens): copy it from "
                    "the model's original repository"
                )
            begin = len(self._ids)
            missing = [language for language in languages if language not in self._ids]
            self._ids |= {language: begin + index for index, language in enumerate(missing)}
            named |= {language: language for language in languages}
        self._unknown = self._ids.get(named["unk_token"], -1)
        if self._unknown < 0 or named["eos_token"] not in self._ids:
            raise CheckpointError(f"{where}: {_VOCABULARY} lacks {named['unk_token']} or {named['eos_token']}")
        self._end = self._ids[named["eos_token"]]
        targets = _vocabulary(files, _TARGETS, where) if settings.get("separate_vocabs") else self._ids
        self._texts = {index: text for text, index in targets.items()}
        self._special = {self._ids[text]: text for text in named.values() if text in self._ids}

    def encode(self, sequence: str, *, add_special_tokens: bool = True) -> _Encoded:
        """Ids of a text; a special token written out in it becomes its id, as does Marian's code of a language."""
        ids: list[int] = []
        if self._marian and (code := _CODE.match(sequence)) is not None:
            ids.append(self._ids.get(code[0], self._unknown))
            sequence = sequence[code.end() :]
        pattern = "|".join(re.escape(text) for text in sorted(self._special.values(), key=len, reverse=True))
        for part in re.split(f"({pattern})", sequence):
            if part in self._special.values():
                ids.append(self._ids[part])
            elif part.strip():
                ids += [self._ids.get(piece, self._unknown) for piece in self._pieces.encode(part).tokens]
        return _Encoded([*ids, self._end] if add_special_tokens else ids)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ids; those that are no tokens give nothing."""
        parts: list[str] = []
        pieces: list[str] = []
        for index in ids:
            special = self._special.get(index)
            if special is None:
                pieces.append(self._texts.get(index, ""))
            elif not skip_special_tokens:
                parts += [joined(pieces), special]
                pieces = []
        return " ".join(part for part in [*parts, joined(pieces)] if part)

    def token_to_id(self, token: str) -> int | None:
        return self._ids.get(token)

    def id_to_token(self, id: int) -> str | None:
        return self._special.get(id, self._texts.get(id))

    def get_vocab_size(self, with_added_tokens: bool = True) -> int:
        return max(len(self._ids), len(self._texts))

    def get_vocab(self, with_added_tokens: bool = True) -> dict[str, int]:
        return dict(self._ids)

    def get_added_tokens_decoder(self) -> Mapping[int, Any]:
        return {index: _Special(text) for index, text in self._special.items()}

    def no_truncation(self) -> None:
        """There is none."""

    def to_str(self) -> str:
        """
        Raises:
            UnsupportedError: there is no tokenizer.json that says what this does.
        """
        raise UnsupportedError("this model's tokenizer has no tokenizer.json, which other programs would need")

    def no_padding(self) -> None:
        """There is none."""


def _content(token: object) -> str | None:
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _vocabulary(files: Mapping[str, bytes], name: str, where: str) -> dict[str, int]:
    found = read_json(files, name, where)
    if not found or not all(type(index) is int and index >= 0 for index in found.values()):
        raise CheckpointError(f"{where}: {name} is missing or gives no ids to tokens; download it again")
    return found
