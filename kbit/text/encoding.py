"""Texts and pairs of texts as encoders read them: with their special tokens, parts and places, whole or in windows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from kbit.checkpoint.source import CheckpointSource
from kbit.host.errors import UnsupportedError, UsageError
from kbit.text.added_tokens import add_tokens_of_files, token_settings
from kbit.text.backend import library_errors, load_backend
from kbit.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import tokenizers

Cut = Literal["longest_first", "only_second"]


@dataclass(frozen=True)
class EncodedText:
    """The tokens of a text, of a pair, or of a window of one.

    Attributes:
        ids: token ids.
        types: token types, as the tokenizer's template gives them where the model is to know them; else 0.
        parts: of every token 0 (the text), 1 (what it is paired with), or None (a special token).
        spans: [first, stop) characters of every token in its part.
        words: which word of its part every token belongs to, or None.
        whole: nothing was cut off.
    """

    ids: Sequence[int]
    types: Sequence[int]
    parts: Sequence[int | None]
    spans: Sequence[tuple[int, int]]
    words: Sequence[int | None]
    whole: bool


class TextEncoder:
    """A checkpoint's tokenizer, for whole texts.

    Attributes:
        tokenizer: the same, for single ids.

    Args:
        source: the checkpoint.

    Raises:
        UnsupportedError: there is no tokenizer.json.
        CheckpointError: a file is not what its name says.
    """

    def __init__(self, source: CheckpointSource) -> None:
        files = source.sidecar_files()
        self.tokenizer = Tokenizer.from_source(source, files)
        where = f"{source.path}: tokenizer.json"
        if "tokenizer.json" not in files:
            raise UnsupportedError(f"{where} is missing: copy it from the model's original repository")
        self._library: tokenizers.Tokenizer = load_backend(files["tokenizer.json"], where)
        add_tokens_of_files(self._library, files, str(source.path))
        self._library.no_padding()
        self._library.no_truncation()
        self._where = where
        self._typed = _takes_types(files, str(source.path))

    def encode(self, text: str, pair: str | None = None) -> EncodedText:
        """All of a text.

        Raises:
            UsageError: the text is no valid Unicode.
            CheckpointError: the vocabulary cannot express it.
        """
        self._library.no_truncation()
        return self._encode(text, pair)[0]

    def windows(
        self, text: str, pair: str | None, longest: int, *, overlap: int = 0, cut: Cut = "longest_first"
    ) -> list[EncodedText]:
        """A text in windows of at most `longest` tokens, special tokens around each; one, where all of it fits.

        Args:
            text, pair: what to encode.
            longest: tokens of a window.
            overlap: tokens that a window shares with the one before it.
            cut: what is cut: the longer of both, or the second alone, which the first then stands before in each.

        Raises:
            UsageError: no valid Unicode; too few tokens for what is not cut and one of what is.
            CheckpointError: the vocabulary cannot express it.
        """
        special = self._library.num_special_tokens_to_add(pair is not None)
        room = longest - special
        if cut == "only_second":
            self._library.no_truncation()
            room -= len(self._library.encode(text, add_special_tokens=False).ids)
        if room <= overlap or room < 1:
            raise UsageError(
                f"windows of {longest} tokens leave {max(room, 0)} for the text, which is not more than the overlap of "
                f"{overlap}: use longer windows, or a smaller overlap or question"
            )
        self._library.enable_truncation(longest, stride=overlap, strategy=cut)
        try:
            return self._encode(text, pair)
        finally:
            self._library.no_truncation()

    def _encode(self, text: str, pair: str | None) -> list[EncodedText]:
        for part in (text, pair or ""):
            try:
                part.encode("utf-8")
            except UnicodeEncodeError as error:
                raise UsageError(
                    f"the text is not valid Unicode at character {error.start}: pass it as UTF-8"
                ) from None
        with library_errors(f"{self._where} cannot encode this text", remedy=""):
            found = self._library.encode(text, pair)
        pieces = [found, *found.overflowing]
        return [_encoded(piece, whole=len(pieces) == 1, typed=self._typed) for piece in pieces]


def _takes_types(files: Mapping[str, bytes], where: str) -> bool:
    """Whether the model is given token types: as `model_input_names` says or, where nothing says it, but for tokenizers
    of no class of their own, whose default leaves them out (transformers 5)."""
    settings = token_settings(files, where)
    names = settings.get("model_input_names")
    if isinstance(names, list):
        return "token_type_ids" in names
    return settings.get("tokenizer_class") not in ("PreTrainedTokenizerFast", "TokenizersBackend")


def _encoded(found: Any, *, whole: bool, typed: bool) -> EncodedText:
    types = found.type_ids if typed else [0] * len(found.ids)
    return EncodedText(found.ids, types, found.sequence_ids, found.offsets, found.word_ids, whole)
