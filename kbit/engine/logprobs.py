"""Log-probabilities of tokens by a model's own logits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kbit import _native
from kbit.engine.answers import TokenInfo
from kbit.engine.sampler import not_finite


def token_infos(
    logits: NDArray[np.float32], rows: Sequence[int], tokens: Sequence[int], top: int, isa: str = ""
) -> list[TokenInfo]:
    """What is known of tokens: the logit less the logarithm of the sum of all e^logit, the sum as `kbit.engine.cuts`
    makes it.

    Args:
        logits: (L, V), contiguous.
        rows: (R,), the rows of logits that say which token comes next.
        tokens: (R,), those that came.
        top: how many of the most probable to name; of equal ones the first in the vocabulary.
        isa: the instruction set; "" for the best.

    Raises:
        KbitError: logits that are no numbers.
    """
    count, top = len(rows), min(top, logits.shape[1])
    best, totals = np.empty(count, np.float32), np.empty(count, np.float64)
    ids, values = np.empty((count, top), np.int64), np.empty((count, top), np.float32)
    _native.score_rows(logits, np.asarray(rows, np.int64), best, totals, ids, values, isa)
    infos = []
    for i, (row, token, total) in enumerate(zip(rows, tokens, totals.tolist(), strict=True)):
        if math.isnan(total):
            raise not_finite(float(best[i]), i)
        normalizer = float(best[i]) + math.log(total)
        named = zip(ids[i].tolist(), values[i].tolist(), strict=True)
        infos.append(
            TokenInfo(
                token,
                logprob=float(logits[row, token]) - normalizer,
                top=tuple((each, value - normalizer) for each, value in named),
            )
        )
    return infos
