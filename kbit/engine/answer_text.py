"""From the tokens of an answer to the text that can be shown so far: whole characters, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kbit.engine.stop import StopMatcher

if TYPE_CHECKING:
    from kbit.text.tokenizer import Tokenizer


class AnswerText:
    """The text of one answer.

    Args:
        tokenizer: the model's.
        context: ids before the first token, whose text is not repeated (`DetokenizerStream`).
        stop: strings that end the text; they may contain special tokens.
        show_special: special tokens are part of the text.

    Attributes:
        decoded: characters that the tokens so far have become, those that are held back included.

    Raises:
        UsageError: a stop string is empty.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        context: Sequence[int] = (),
        stop: Sequence[str] = (),
        *,
        show_special: bool = False,
    ) -> None:
        self._detokenizer = tokenizer.stream(context, skip_special_tokens=not show_special)
        self._special = {} if show_special else tokenizer.special_texts()
        self._stops = StopMatcher(stop, self._special.values())
        self.decoded = 0

    @property
    def matched(self) -> str | None:
        """The stop string that was found."""
        return self._stops.matched

    def push(self, token: int) -> str:
        """The text that can be shown after one more token."""
        text = self._detokenizer.push(token)
        self.decoded += len(text)
        return self._stops.push(text) + self._stops.push(self._special.get(token, ""), special=True)

    def finish(self, end: int | None = None) -> str:
        """What was held back, now that no more tokens come.

        Args:
            end: a token that ended the answer: no part of the text, but it may complete a stop string.
        """
        text = self._detokenizer.finish()
        self.decoded += len(text)
        rest = self._stops.push(text)
        if end is not None:
            rest += self._stops.push(self._special.get(end, ""), special=True)
        return rest + self._stops.finish()
