"""Labels of texts, of pairs of texts, and of the words of a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from kbit.checkpoint.source import CheckpointSource
from kbit.engine.encoder import Encoder, TokenizedText
from kbit.engine.fill import require_head
from kbit.engine.heads import Floats, sigmoid, softmax
from kbit.engine.pooling import pool
from kbit.graph.backend import Backend
from kbit.host.errors import UsageError
from kbit.models.task_config import labels_of
from kbit.text.encoding import EncodedText, TextEncoder

Aggregation = Literal["none", "simple", "first", "average", "max"]
AGGREGATIONS: tuple[Aggregation, ...] = ("none", "simple", "first", "average", "max")

# What is no entity, in the usual schemes.
OUTSIDE = "O"


@dataclass(frozen=True)
class Labelled:
    """What a text is.

    Attributes:
        scores: of every label, in the order of the model's: probabilities, or the number itself where the label is one
            (`problem_type` "regression").
        logits: before that.
        tokens: of the text, or of what was read of it.
        cut: only its beginning was read.
    """

    scores: tuple[float, ...]
    logits: tuple[float, ...]
    tokens: int
    cut: bool


@dataclass(frozen=True)
class Entity:
    """Some characters of a text and their label, the mean probability of its tokens or words."""

    label: str
    score: float
    start: int
    stop: int
    text: str


class Classifier:
    """A model with a head for labels.

    Attributes:
        encoder: the model.
        labels: their names.

    Args:
        source: the checkpoint.
        backend: who computes.

    Raises:
        UnsupportedError: the model has no such head.
        CheckpointError: the model cannot be read.
    """

    def __init__(self, source: CheckpointSource, backend: Backend) -> None:
        require_head(
            source, ("sequence", "tokens"), "gives labels", "ForSequenceClassification or ForTokenClassification"
        )
        self.text = TextEncoder(source)
        self.encoder = Encoder(source, backend)
        self.labels = labels_of(source.config, f"config of {source.path}")
        task = self.encoder.spec.task
        assert task is not None
        self._task = task
        self._plain = _identity(source.config)

    @property
    def of_tokens(self) -> bool:
        """Whether it labels words, and not whole texts."""
        return self._task.kind == "tokens"

    def label(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> list[Labelled]:
        """Labels of whole texts, or of pairs of texts (`pairs`, one for each).

        Texts that are too long are cut, the longer of a pair first.

        Raises:
            UsageError: this model labels words; a text that cannot be encoded.
        """
        if self.of_tokens:
            raise UsageError("this model labels words (ForTokenClassification), not whole texts")
        longest = self.encoder.spec.context_length
        pieces = []
        for index, text in enumerate(texts):
            pieces.append(self.text.windows(text, None if pairs is None else pairs[index], longest)[0])
        states = self.encoder.hidden([TokenizedText(piece.ids, piece.types) for piece in pieces])
        logits = self.encoder.head.scores(np.stack([pool(part, (self._task.pooling,)) for part in states]))
        return [
            Labelled(tuple(scores), tuple(row), len(piece.ids), not piece.whole)
            for scores, row, piece in zip(self._scores(logits).tolist(), logits.tolist(), pieces, strict=True)
        ]

    def entities(
        self, text: str, aggregation: Aggregation = "simple", overlap: int = 64, ignored: Sequence[str] = (OUTSIDE,)
    ) -> list[Entity]:
        """Labelled stretches of a text, as transformers' TokenClassificationPipeline finds them.

        A text that is too long is read in windows; a token counts where it is farthest from a window's ends.

        Args:
            text: any length.
            aggregation: "none": every token; "simple": neighbours of one label together; "first", "average", "max":
                words first, which have the label of their first token, of the mean, or of the surest token.
            overlap: tokens that windows share.
            ignored: labels to leave out.

        Raises:
            UsageError: this model labels whole texts; a text that cannot be encoded.
        """
        if not self.of_tokens:
            raise UsageError("this model labels whole texts (ForSequenceClassification), not words")
        longest = self.encoder.spec.context_length
        pieces = self.text.windows(text, None, longest, overlap=min(overlap, longest // 4))
        states = self.encoder.hidden([TokenizedText(piece.ids, piece.types) for piece in pieces])
        scores = [softmax(self.encoder.head.scores(part)) for part in states]
        tokens = _tokens(pieces, scores)
        units = tokens if aggregation in ("none", "simple") else _words(tokens, aggregation)
        found = [(self.labels[int(row.argmax())], float(row.max()), span) for _, span, row in units]
        if aggregation != "none":
            found = _grouped(found)
        return [
            Entity(label, score, start, stop, text[start:stop])
            for label, score, (start, stop) in found
            if label not in ignored
        ]

    def _scores(self, logits: Floats) -> Floats:
        if self._task.problem == "regression" or (self._plain and len(self.labels) == 1):
            return logits
        return sigmoid(logits) if self._task.problem == "multi" else softmax(logits)


_Token = tuple[int | None, tuple[int, int], Floats]  # word, characters, probabilities


def _identity(config: object) -> bool:
    """Whether a reranker asks for logits themselves, as sentence-transformers' CrossEncoder reads its configuration."""
    assert isinstance(config, dict)
    about = config.get("sentence_transformers")
    named = about.get("activation_fn") if isinstance(about, dict) else None
    named = named or config.get("sbert_ce_default_activation_function")
    return isinstance(named, str) and named.rpartition(".")[2] == "Identity"


def _tokens(pieces: Sequence[EncodedText], scores: Sequence[Floats]) -> list[_Token]:
    """The tokens of a text, each once, from where it is farthest from the ends of its window."""
    best: dict[tuple[int, int], tuple[int, _Token]] = {}
    for piece, rows in zip(pieces, scores, strict=True):
        for at, part in enumerate(piece.parts):
            if part != 0:
                continue
            span, inside = piece.spans[at], min(at, len(piece.ids) - 1 - at)
            if span not in best or best[span][0] < inside:
                best[span] = (inside, (piece.words[at], span, rows[at]))
    return [token for _, (_, token) in sorted(best.items())]


def _words(tokens: Sequence[_Token], aggregation: Aggregation) -> list[_Token]:
    """Tokens of one word together."""
    words: list[list[_Token]] = []
    for token in tokens:
        if words and token[0] is not None and words[-1][-1][0] == token[0]:
            words[-1].append(token)
        else:
            words.append([token])
    found: list[_Token] = []
    for parts in words:
        rows = np.stack([row for _, _, row in parts])
        if aggregation == "first":
            row = rows[0]
        elif aggregation == "average":
            row = rows.mean(axis=0)
        else:
            row = rows[int(rows.max(axis=1).argmax())]
        found.append((parts[0][0], (parts[0][1][0], parts[-1][1][1]), row))
    return found


def _grouped(
    found: Sequence[tuple[str, float, tuple[int, int]]],
) -> list[tuple[str, float, tuple[int, int]]]:
    """Neighbours of one kind together: "B-" begins a new one, "I-" goes on, and what has neither does, too."""
    groups: list[tuple[str, list[float], int, int]] = []
    for label, score, (start, stop) in found:
        begins, kind = label.startswith("B-"), label[2:] if label[:2] in ("B-", "I-") else label
        if groups and groups[-1][0] == kind and not begins:
            last = groups[-1]
            groups[-1] = (kind, [*last[1], score], last[2], stop)
        else:
            groups.append((kind, [score], start, stop))
    return [(kind, float(np.mean(scores)), (start, stop)) for kind, scores, start, stop in groups]
