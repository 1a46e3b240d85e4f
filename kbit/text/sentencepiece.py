"""SentencePiece models (`.spm`, `.model`) as tokenizers of the `tokenizers` library, without the SentencePiece library.

A model is a protocol buffer (sentencepiece_model.proto): pieces with scores, how it was trained, how text is
normalised. Only what segmenting needs is read.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kbit.host.errors import CheckpointError, UnsupportedError
from kbit.text.backend import library_errors

if TYPE_CHECKING:
    import tokenizers

_SPACE = "\u2581"
_UNIGRAM, _BPE = 1, 2
# Field numbers of sentencepiece_model.proto.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_TEXT, _SCORE, _TYPE = 1, 2, 3
# Types of pieces: those that texts are made of.
_NORMAL, _USER_DEFINED = 1, 4
_SEEN = (_NORMAL, _USER_DEFINED)
_MODEL_TYPE, _BYTE_FALLBACK, _UNKNOWN_ID = 3, 35, 40
_CHARSMAP, _PREFIX, _EXTRA_SPACES, _ESCAPED = 2, 3, 4, 5


@dataclass(frozen=True)
class SentencePieceModel:
    """What a file holds.

    Attributes:
        where: its name, for errors.
        pieces: texts and scores, by id.
        unseen: ids of pieces that no text is made of (unknown, control).
        whole: texts of pieces that are never taken apart (user-defined).
        kind: 1: unigram, 2: BPE.
        unknown: the id of the piece for what is no piece.
        charsmap: how characters are normalised; empty: they are not.
        prefix: a space stands before every text.
    """

    where: str
    pieces: Sequence[tuple[str, float]]
    unseen: frozenset[int]
    whole: Sequence[str]
    kind: int
    unknown: int
    charsmap: bytes
    prefix: bool

    @classmethod
    def parse(cls, data: bytes, where: str) -> SentencePieceModel:
        """Reads a file.

        Args:
            data: its bytes.
            where: its name, for errors.

        Raises:
            CheckpointError: it is no such model.
            UnsupportedError: of a kind that is not read here.
        """
        pieces: list[tuple[str, float]] = []
        unseen: set[int] = set()
        whole: list[str] = []
        trainer: dict[int, int] = {}
        normalizer: dict[int, int | bytes] = {}
        try:
            for number, value in _fields(data):
                if number == _PIECES and isinstance(value, bytes):
                    text, score, type_ = _piece(value)
                    unseen |= set() if type_ in _SEEN else {len(pieces)}
                    pieces.append((text, score))
                    whole += [text] if type_ == _USER_DEFINED else []
                elif number == _TRAINER and isinstance(value, bytes):
                    trainer |= {n: v for n, v in _fields(value) if isinstance(v, int)}
                elif number == _NORMALIZER and isinstance(value, bytes):
                    normalizer |= dict(_fields(value))
        except (IndexError, ValueError, struct.error):
            pieces = []
        if not pieces:
            raise CheckpointError(f"{where} is no SentencePiece model; download it again")
        kind, unknown = trainer.get(_MODEL_TYPE, _UNIGRAM), trainer.get(_UNKNOWN_ID, 0)
        plain = normalizer.get(_EXTRA_SPACES, 1) and normalizer.get(_ESCAPED, 1) and not trainer.get(_BYTE_FALLBACK, 0)
        if kind not in (_UNIGRAM, _BPE) or not plain:
            raise UnsupportedError(
                f"{where} segments text in a way that kbit does not (model type {kind}); convert it once to "
                "tokenizer.json"
            )
        if not 0 <= unknown < len(pieces):
            raise CheckpointError(f"{where}: the unknown piece has id {unknown} of {len(pieces)}; download it again")
        charsmap = normalizer.get(_CHARSMAP, b"")
        # (The library takes as much memory as the first number says.)
        if charsmap and (not isinstance(charsmap, bytes) or int.from_bytes(charsmap[:4], "little") > len(charsmap) - 4):
            raise CheckpointError(f"{where}: its map of characters is damaged; download it again")
        return cls(
            where,
            pieces,
            frozenset(unseen),
            whole,
            kind,
            unknown,
            charsmap if isinstance(charsmap, bytes) else b"",
            bool(normalizer.get(_PREFIX, 1)),
        )

    def tokenizer(self) -> tokenizers.Tokenizer:
        """The same as a tokenizer of the library, whose tokens are pieces, and texts where there is no piece.

        Raises:
            CheckpointError: the library does not like the pieces.
        """
        with library_errors(f"{self.where} is no sound SentencePiece model"):
            return self._made()

    def _made(self) -> tokenizers.Tokenizer:
        from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

        # What no text is made of gets a name that no text has.
        seen = [(f"\0{text}" if i in self.unseen else text, score) for i, (text, score) in enumerate(self.pieces)]
        if self.kind == _UNIGRAM:
            model: models.Model = models.Unigram(seen, self.unknown, byte_fallback=False)
        else:
            ids = {text: index for index, (text, _) in enumerate(seen)}
            model = models.BPE(
                ids,
                _merges(seen, ids),
                unk_token=seen[self.unknown][0],
                fuse_unk=True,
            )
        made = Tokenizer(model)
        steps = [normalizers.Precompiled(self.charsmap)] if self.charsmap else []
        made.normalizer = normalizers.Sequence([*steps, normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip()])
        made.add_tokens([AddedToken(text, normalized=False) for text in self.whole])
        scheme = "always" if self.prefix else "never"
        made.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme=scheme)
        return made


def t5_tokenizer(data: bytes, extra: int, where: str) -> tokenizers.Tokenizer:
    """The tokenizer of a T5 model that has its SentencePiece file alone, as transformers 5 makes it (`T5Tokenizer`).

    Args:
        data: the file.
        extra: how many tokens <extra_id_...> stand behind its pieces.
        where: its name, for errors.

    Raises:
        CheckpointError, UnsupportedError: see `SentencePieceModel.parse`; it is not T5's.
    """
    model = SentencePieceModel.parse(data, where)
    special = [text for text, _ in model.pieces[:3]]
    if model.kind != _UNIGRAM or special != ["<pad>", "</s>", "<unk>"] or model.unknown != 2:
        raise UnsupportedError(
            f"{where} is not T5's: its first pieces are {special}; convert it once to tokenizer.json"
        )
    with library_errors(f"{where} is no sound SentencePiece model"):
        return _t5(model, special, extra)


def _t5(model: SentencePieceModel, special: Sequence[str], extra: int) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    names = [f"<extra_id_{index}>" for index in reversed(range(extra))]
    made = Tokenizer(models.Unigram([*model.pieces, *((name, 0.0) for name in names)], 2, byte_fallback=False))
    if model.charsmap:
        made.normalizer = normalizers.Precompiled(model.charsmap)
    space = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="always", split=True)
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), space])
    made.decoder = decoders.Metaspace(replacement=_SPACE, prepend_scheme="always", split=True)
    made.add_special_tokens([*special, *names])
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return made


def joined(pieces: Sequence[str]) -> str:
    """The text that pieces are of."""
    return "".join(pieces).replace(_SPACE, " ").strip()


def _piece(data: bytes) -> tuple[str, float, int]:
    text, score, type_ = "", 0.0, _NORMAL
    for number, value in _fields(data):
        if number == _TEXT and isinstance(value, bytes):
            text = value.decode("utf-8")
        elif number == _SCORE and isinstance(value, bytes):
            (score,) = struct.unpack("<f", value)
        elif number == _TYPE and isinstance(value, int):
            type_ = value
    return text, score, type_


def _merges(pieces: Sequence[tuple[str, float]], ids: dict[str, int]) -> list[tuple[str, str]]:
    """Every split of a piece into two pieces, ranked by its score."""
    found = []
    for text, score in pieces:
        for at in range(1, len(text)):
            left, right = text[:at], text[at:]
            if left in ids and right in ids:
                found.append((-score, ids[text], -at, left, right))
    # Among the splits of one piece the longest left part goes first: it is what leftmost joining leaves behind.
    return [(left, right) for *_, left, right in sorted(found)]


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a protocol buffer: numbers and values, integers or bytes (of fixed sizes, too).

    Raises:
        IndexError, ValueError: it is none.
    """
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"no such wire type: {wire}")
        if at + size > len(data):
            raise ValueError("a field is longer than the file")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("a number of more than 64 bits")
