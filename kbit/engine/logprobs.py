"""Log-probabilities of tokens by a model's own logits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kbit.engine.answers import TokenInfo


def token_infos(logits: NDArray[np.float32], tokens: Sequence[int], top: int) -> list[TokenInfo]:
    """What is known of tokens.

    Args:
        logits: (R, V), of which row r says which token comes next.
        tokens: (R,), those that came.
        top: how many of the most probable to name; of equal ones the first in the vocabulary.
    """
    infos = []
    for row, token in zip(np.asarray(logits, dtype=np.float32), tokens, strict=True):
        largest = row.max()
        normalizer = float(largest) + float(np.log(np.exp(row - largest).sum(dtype=np.float64)))
        infos.append(TokenInfo(token, logprob=float(row[token]) - normalizer, top=_most_probable(row, normalizer, top)))
    return infos


def _most_probable(row: NDArray[np.float32], normalizer: float, count: int) -> tuple[tuple[int, float], ...]:
    if not count:
        return ()
    count = min(count, row.size)
    threshold = np.partition(row, row.size - count)[row.size - count]
    candidates = np.flatnonzero(row >= threshold)
    best = candidates[np.lexsort((candidates, -row[candidates]))][:count]
    return tuple((int(token), float(row[token]) - normalizer) for token in best)
