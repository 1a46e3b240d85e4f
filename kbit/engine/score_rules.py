"""What is done to the scores of next tokens before one is chosen, in the order of transformers' processors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from kbit.engine.generation_settings import GenerationSettings

Floats = NDArray[np.float32]


def log_softmax(x: Floats) -> Floats:
    """Log probabilities over the last axis, in float32."""
    x = x - x.max(axis=-1, keepdims=True)
    logs: Floats = x - np.log(np.exp(x).sum(axis=-1, keepdims=True, dtype=np.float32))
    return logs


class ScoreRules:
    """The rules of some settings.

    Args:
        settings: which.
        begin: tokens that every text begins with, where it is not the first alone.
    """

    def __init__(self, settings: GenerationSettings, begin: int | None = None) -> None:
        self.settings = settings
        ends = {(end,) for end in settings.ends}
        words = [word for word in settings.bad_words if word not in ends]
        self._never = np.array([word[0] for word in words if len(word) == 1], dtype=np.int64)
        self._words = [word for word in words if len(word) > 1]
        # (A forced first token counts as part of the beginning.)
        self._begin = begin or (1 if settings.forced_first is None else 2)

    def apply(self, texts: Sequence[Sequence[int]], sources: Sequence[Sequence[int]], scores: Floats) -> None:
        """Changes scores in place.

        Args:
            texts: the tokens so far of every row, the first included, all of one length.
            sources: of every row, the tokens that its encoder read.
            scores: (R, V), logits or log probabilities of the next.
        """
        for text, source, row in zip(texts, sources, scores, strict=True):
            self._apply(text, source, row)

    def _apply(self, text: Sequence[int], source: Sequence[int], row: Floats) -> None:
        s, length = self.settings, len(text)
        if s.repetition_penalty != 1.0:
            seen = np.unique(np.array(text))
            penalty = np.float32(s.repetition_penalty)
            row[seen] = np.where(row[seen] < 0, row[seen] * penalty, row[seen] / penalty)
        if s.no_repeat:
            row[list(_completing(text, text, s.no_repeat))] = -np.inf
        if s.no_repeat_of_source:
            row[list(_completing(text, source, s.no_repeat_of_source))] = -np.inf
        row[self._never] = -np.inf
        for word in self._words:
            if len(word) <= length + 1 and tuple(text[1 - len(word) :]) == word[:-1]:
                row[word[-1]] = -np.inf
        if length < s.shortest:
            row[list(s.ends)] = -np.inf
        if s.forced_first is not None and length == 1:
            _force(row, [s.forced_first])
        if s.forced_last and length == s.longest - 1:
            _force(row, s.forced_last)
        row[list(s.suppressed)] = -np.inf
        if s.suppressed_first and length == self._begin:
            row[list(s.suppressed_first)] = -np.inf
        if s.renormalized:
            row[:] = log_softmax(row)


def _force(row: Floats, tokens: Sequence[int]) -> None:
    row[:] = -np.inf
    row[list(tokens)] = 0.0


def _completing(text: Sequence[int], of: Sequence[int], size: int) -> Iterator[int]:
    """The tokens that would make the last `size` of a text an n-gram of another."""
    if len(text) + 1 < size:
        return
    last = tuple(text[len(text) + 1 - size :])
    for begin in range(len(of) - size + 1):
        if tuple(of[begin : begin + size - 1]) == last:
            yield of[begin + size - 1]
