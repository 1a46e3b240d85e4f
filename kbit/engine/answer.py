"""Questions about a text: the stretch of it that answers them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kbit.checkpoint.source import CheckpointSource
from kbit.engine.encoder import Encoder, TokenizedText
from kbit.engine.fill import require_head
from kbit.engine.heads import Floats, softmax
from kbit.graph.backend import Backend
from kbit.text.encoding import EncodedText, TextEncoder

# Tokens of a window and of what it shares with the next, as in transformers' QuestionAnsweringPipeline.
WINDOW, OVERLAP = 384, 128


@dataclass(frozen=True)
class Answer:
    """A stretch of the context, [start, stop) characters, and its score; or none: no text, and start and stop 0."""

    text: str
    score: float
    start: int
    stop: int


class Answerer:
    """A model with a head for spans.

    Attributes:
        encoder: the model.

    Args:
        source: the checkpoint.
        backend: who computes.

    Raises:
        UnsupportedError: the model has no such head.
        CheckpointError: the model cannot be read.
    """

    def __init__(self, source: CheckpointSource, backend: Backend) -> None:
        require_head(source, ("span",), "finds answers", "ForQuestionAnswering")
        self.text = TextEncoder(source)
        self.encoder = Encoder(source, backend)

    def answer(
        self,
        question: str,
        context: str,
        *,
        top: int = 1,
        longest_answer: int = 30,
        window: int = WINDOW,
        overlap: int = OVERLAP,
        may_be_absent: bool = False,
    ) -> tuple[list[Answer], int]:
        """The best answers, the best first, and in how many windows the context was read.

        A stretch's score is the probability that it begins where it does times that it ends there, over the tokens of
        its window's context (and the first token, where an answer may be absent).

        Args:
            question, context: texts.
            top: how many answers.
            longest_answer: tokens of an answer.
            window: tokens of a window, question and special tokens included.
            overlap: tokens of the context that windows share.
            may_be_absent: the context may have no answer (models trained on SQuAD 2).

        Raises:
            UsageError: a question too long for the windows; a text that cannot be encoded.
        """
        window = min(window, self.encoder.spec.context_length)
        pieces = self.text.windows(question, context, window, overlap=min(overlap, window // 2), cut="only_second")
        states = self.encoder.hidden([TokenizedText(piece.ids, piece.types) for piece in pieces])
        found: dict[tuple[int, int], float] = {}
        absent = 1.0
        for piece, part in zip(pieces, states, strict=True):
            scores = self.encoder.head.scores(part)
            nothing = self._spans(piece, scores, longest_answer, may_be_absent, found)
            absent = min(absent, nothing)
        if may_be_absent:
            found[0, 0] = absent  # only where every window says so
        best = sorted(found.items(), key=lambda item: -item[1])[:top]
        return [Answer(context[start:stop], score, start, stop) for (start, stop), score in best], len(pieces)

    @staticmethod
    def _spans(
        piece: EncodedText, scores: Floats, longest: int, may_be_absent: bool, found: dict[tuple[int, int], float]
    ) -> float:
        """Adds a window's stretches to `found`, by their characters, and returns the score of none."""
        places = [at for at, part in enumerate(piece.parts) if part == 1]
        if not places:
            return 1.0
        counted = [0, *places] if may_be_absent else places
        starts, stops = (softmax(scores[counted, column]).astype(np.float64) for column in (0, 1))
        nothing = float(starts[0] * stops[0]) if may_be_absent else 0.0
        if may_be_absent:
            starts, stops = starts[1:], stops[1:]
        products = np.triu(starts[:, None] * stops[None, :])
        products = products - np.triu(products, longest)
        best = np.argsort(-products, axis=None, kind="stable")[: 4 * longest]
        for flat in best.tolist():
            first, last = divmod(flat, len(places))
            if products[first, last] > 0:
                span = (piece.spans[places[first]][0], piece.spans[places[last]][1])
                found[span] = max(found.get(span, 0.0), float(products[first, last]))
        return nothing
