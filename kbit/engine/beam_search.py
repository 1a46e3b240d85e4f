"""Texts of an encoder-decoder: the best token every time, or beam search as in transformers 5 (`_beam_search`).

A source's search does not depend on those beside it: all open beams of all sources go through the decoder together, a
token each, and share the pages of what they have in common.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kbit.engine.generation_settings import GenerationSettings
from kbit.engine.passes import passes_of
from kbit.engine.score_rules import ScoreRules, log_softmax
from kbit.graph.batch import Batch
from kbit.host.errors import UsageError
from kbit.models.encoder_decoder import EncoderDecoder

Floats = NDArray[np.float32]

# Rows of the decoder that go through the model at once, where a single source has not more.
PASS_ROWS = 64
# Room for tokens of a text at first; it is doubled where texts become longer.
_FIRST_ROOM = 64
# What stands for no score: transformers' number, whose roundings in float32 decide between equals.
_NONE = np.float32(-1e9)


@dataclass(frozen=True)
class Written:
    """A generated text.

    Attributes:
        ids: its tokens, the first one and that which ended it included.
        score: of the beam: the sum of log probabilities over length^penalty; None without beams.
        finished: it ended by itself; else it was cut off.
    """

    ids: tuple[int, ...]
    score: float | None
    finished: bool


def write(model: EncoderDecoder, sources: Sequence[Sequence[int]], settings: GenerationSettings) -> list[Written]:
    """Generates a text for each source.

    Args:
        model: the model.
        sources: token ids, what stands around a text included.
        settings: how.

    Raises:
        UsageError: a source that cannot be read (`EncoderDecoder.encode`); a text that may be longer than the model has
            positions for; more beams than there are tokens to choose from.
    """
    spec = model.spec
    if settings.longest > spec.context_length:
        raise UsageError(
            f"a text of {settings.longest} tokens is longer than the {spec.context_length} positions that this "
            f"{spec.family} model has; use --max-tokens {spec.context_length - 1}"
        )
    if settings.beams > 1 and _candidates(settings) > settings.beams * spec.vocab_size:
        raise UsageError(f"{settings.beams} beams are more than a vocabulary of {spec.vocab_size} has use for")
    found: dict[int, Written] = {}
    for group in passes_of([len(source) for source in sources], max(1, PASS_ROWS // settings.beams)):
        written = _write_group(model, [sources[index] for index in group], settings)
        found |= dict(zip(group, written, strict=True))
    return [found[index] for index in range(len(sources))]


def _write_group(
    model: EncoderDecoder, sources: Sequence[Sequence[int]], settings: GenerationSettings
) -> list[Written]:
    cache = model.encode(sources, min(_FIRST_ROOM, settings.longest))
    rules = ScoreRules(settings)
    searches: list[_Greedy | _Beams] = [_Greedy(settings) if settings.beams == 1 else _Beams(settings) for _ in sources]
    if settings.beams > 1:
        cache.select([index for index in range(len(sources)) for _ in range(settings.beams)])
    open_ones = list(range(len(sources)))
    while True:
        texts = [text for index in open_ones for text in searches[index].texts]
        of = [sources[index] for index in open_ones for _ in searches[index].texts]
        if len(texts[0]) > cache.capacity:
            cache.grow(min(settings.longest, 2 * cache.capacity))
        scores = model.run(Batch.of([text[-1:] for text in texts], cache.lengths), cache)
        if settings.beams > 1:
            scores = log_softmax(scores)
        rules.apply(texts, of, scores)
        kept: list[int] = []
        still: list[int] = []
        for at, index in enumerate(open_ones):
            first = at * settings.beams
            parents = searches[index].step(scores[first : first + settings.beams])
            if parents:
                kept += [first + parent for parent in parents]
                still.append(index)
        if not still:
            return [search.result() for search in searches]
        if kept != list(range(len(texts))):
            cache.select(kept)
        open_ones = still


class _Greedy:
    """The best token every time."""

    def __init__(self, settings: GenerationSettings) -> None:
        self._settings = settings
        self.texts = [[settings.start]]

    def step(self, scores: Floats) -> list[int]:
        """Scores of the next token (1, V) -> the row to go on with, or none."""
        text, s = self.texts[0], self._settings
        text.append(int(scores[0].argmax()))
        return [] if text[-1] in s.ends or len(text) >= s.longest else [0]

    def result(self) -> Written:
        text = self.texts[0]
        return Written(tuple(text), None, text[-1] in self._settings.ends)


def _candidates(settings: GenerationSettings) -> int:
    """Continuations that are looked at: enough that as many go on as there are beams, whatever ends."""
    return max(2, 1 + len(settings.ends)) * settings.beams


class _Beams:
    """The beams of one source.

    Attributes:
        texts: of the open beams, the best first.
    """

    def __init__(self, settings: GenerationSettings) -> None:
        self._settings = settings
        beams = settings.beams
        self.texts = [[settings.start]] * beams
        # (All beams are the same at first: only one counts.)
        self._scores = np.array([0.0] + [_NONE] * (beams - 1), dtype=np.float32)
        self._done = [[settings.start]] * beams
        self._done_scores = np.full(beams, _NONE, dtype=np.float32)
        self._is_done = np.zeros(beams, dtype=bool)
        self._improvable = True

    def step(self, scores: Floats) -> list[int]:
        """Log probabilities of the next token (beams, V) -> which rows to go on with, by beam, or none."""
        s, beams = self._settings, self._settings.beams
        total = (scores + self._scores[:, None]).reshape(-1)
        best = _top(total, _candidates(s))
        sums, parents, tokens = total[best], best // scores.shape[1], best % scores.shape[1]
        texts = [[*self.texts[parent], int(token)] for parent, token in zip(parents, tokens, strict=True)]
        length = len(texts[0])
        ends = np.array([text[-1] in s.ends or length >= s.longest for text in texts])
        self._finish(texts, sums, ends, length)
        running = sums + ends.astype(np.float32) * _NONE
        kept = _top(running, beams)
        self.texts, self._scores = [texts[index] for index in kept], running[kept]
        self._improvable = self._improvable and self._may_improve(length)
        full = bool(self._is_done.all()) and s.early_stopping is True
        if not self._improvable or full or bool(ends.all()):
            return []
        return [int(parents[index]) for index in kept]

    def _finish(self, texts: list[list[int]], sums: Floats, ends: NDArray[np.bool_], length: int) -> None:
        """Keeps the best of what was finished before and what now is: of the best candidates, those that end."""
        s = self._settings
        ended = ends & (np.arange(len(ends)) < s.beams)
        scores = sums / np.float32((length - 1) ** s.length_penalty)
        scores = scores + (~ended).astype(np.float32) * _NONE
        merged = np.concatenate([self._done_scores, scores])
        best = _top(merged, s.beams)
        every, done = [*self._done, *texts], np.concatenate([self._is_done, ended])
        self._done = [every[index] for index in best]
        self._done_scores, self._is_done = merged[best], done[best]

    def _may_improve(self, length: int) -> bool:
        """Whether an open beam may still become better than the worst that is finished."""
        s = self._settings
        longest = s.longest if s.early_stopping == "never" and s.length_penalty > 0 else length
        possible = self._scores[0] / np.float32((longest - 1) ** s.length_penalty)
        worst = np.where(self._is_done, self._done_scores.min(), _NONE)
        return bool((possible > worst).any())

    def result(self) -> Written:
        text = self._done[0]
        return Written(tuple(text), float(self._done_scores[0]), text[-1] in self._settings.ends)


def _top(values: Floats, count: int) -> NDArray[np.int64]:
    """The indices of the largest, the largest first; of equals the first."""
    if count < len(values):
        least = np.partition(values, len(values) - count)[len(values) - count]
        above = np.flatnonzero(values > least)
        chosen = np.sort(np.concatenate([above, np.flatnonzero(values == least)[: count - len(above)]]))
    else:
        chosen = np.arange(len(values))
    order: NDArray[np.int64] = chosen[np.argsort(-values[chosen], kind="stable")]
    return order
