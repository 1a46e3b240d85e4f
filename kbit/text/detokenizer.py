"""Token ids to text, one token at a time, without ever showing half a character.

A tokenizer decodes a whole sequence; a stream needs the part a new token adds. The difference of two decodes gives it,
and a short window of recent tokens is enough context, so the cost per token does not grow with the text.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from kbit.text.backend import decode

if TYPE_CHECKING:
    from kbit.text.backend import TokenizerBackend

REPLACEMENT = "\ufffd"

# An incomplete UTF-8 sequence is at most 3 bytes long, so it started at most 3 tokens ago. One token more is context
# for decoders that treat the first token of a text differently (sentencepiece drops its leading space).
_CONTEXT_TOKENS = 4
_WINDOW_TOKENS = 16

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class DetokenizerStream:
    """Incremental detokenizer: `push` ids, get text made of complete characters; `finish` gives what is left.

    All pushes plus finish, joined, equal decoding all ids at once. There is one exception, in vocabularies with byte
    fallback (sentencepiece): when a run of byte tokens is invalid UTF-8 as a whole, a decode of everything replaces
    each byte of the run, also those of the valid characters in it, by U+FFFD; the stream has shown these characters
    already and replaces only the invalid bytes.

    Args:
        backend: the tokenizer.
        skip_ids: ids that produce no text (special tokens).
        byte_fallback: the decoder turns tokens such as <0xE2> into bytes.
        context: ids that stand before the first pushed one, whose text is not repeated. With them a first token keeps
            the leading space a decoder removes at the beginning of a text.
    """

    def __init__(
        self,
        backend: TokenizerBackend,
        skip_ids: Collection[int] = (),
        byte_fallback: bool = False,
        context: Sequence[int] = (),
    ) -> None:
        self._backend = backend
        self._skip_ids = skip_ids
        self._byte_fallback = byte_fallback
        self._bytes = bytearray()  # byte tokens not yet shown
        self._in_byte_run = False
        self._opens_text = False  # the byte run stands at the beginning of the text and has shown nothing
        self._window = [i for i in context[-8 * _CONTEXT_TOKENS :] if self._visible(i)][-_CONTEXT_TOKENS:]
        text = self._decode(self._window)
        # Number of characters of the window's text already shown. The last character may be held back: a trailing
        # U+FFFD can be the first bytes of a character the next token completes.
        self._shown = len(text) - text.endswith(REPLACEMENT)

    def push(self, token_id: int) -> str:
        """The text this token completes; often a word, "" while a character is incomplete."""
        if not self._visible(token_id):
            return ""
        if self._byte_fallback:
            match = _BYTE_TOKEN.fullmatch(self._backend.id_to_token(token_id) or "")
            if match is not None:
                return self._push_byte(token_id, int(match.group(1), 16))
        piece = self._end_byte_run()
        self._window.append(token_id)
        text = self._decode(self._window)
        end = len(text) - text.endswith(REPLACEMENT)
        if end > self._shown:
            piece += text[self._shown : end]
            self._shown = end
        if len(self._window) >= _WINDOW_TOKENS:
            self._shrink()
        return piece

    def finish(self) -> str:
        """Everything still held back; bytes that never became a character are U+FFFD. The stream is empty after."""
        piece = self._end_byte_run()
        text = self._decode(self._window)
        piece += text[self._shown :]
        self._window, self._shown = [], 0
        return piece

    def _visible(self, token_id: int) -> bool:
        # Models whose logits are padded to a round size can produce ids no token has.
        return token_id not in self._skip_ids and self._backend.id_to_token(token_id) is not None

    def _decode(self, ids: Sequence[int]) -> str:
        return decode(self._backend, ids, skip_special_tokens=False) if ids else ""

    def _shrink(self) -> None:
        held = self._decode(self._window).endswith(REPLACEMENT)
        self._window = self._window[-_CONTEXT_TOKENS:]
        self._shown = len(self._decode(self._window)) - held

    def _push_byte(self, token_id: int, byte: int) -> str:
        piece = ""
        if not self._in_byte_run:  # a U+FFFD held back before the run is a real one
            text = self._decode(self._window)
            piece = text[self._shown :]
            self._in_byte_run = True
            self._opens_text = not self._window
        self._window.append(token_id)
        if len(self._window) >= _WINDOW_TOKENS:
            self._window = self._window[-_CONTEXT_TOKENS:]
        self._bytes.append(byte)
        characters = self._take_characters()
        if characters and self._opens_text:
            # A decoder that drops a space at the beginning of a text drops it here too: ask it.
            self._opens_text = False
            if REPLACEMENT not in characters:
                characters = self._decode(self._window)
        return piece + characters

    def _take_characters(self) -> str:
        """Complete characters at the front of the byte buffer, one U+FFFD for each byte that can belong to none."""
        text = ""
        while self._bytes:
            try:
                text += self._bytes.decode("utf-8")
                self._bytes.clear()
            except UnicodeDecodeError as error:
                text += self._bytes[: error.start].decode("utf-8")
                if error.reason == "unexpected end of data":
                    del self._bytes[: error.start]
                    break
                text += REPLACEMENT * (error.end - error.start)
                del self._bytes[: error.end]
        return text

    def _end_byte_run(self) -> str:
        if not self._in_byte_run:
            return ""
        piece = REPLACEMENT * len(self._bytes)
        self._bytes.clear()
        self._in_byte_run = False
        self._shown = len(self._decode(self._window))
        return piece
