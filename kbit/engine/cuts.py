"""What a draw looks at: weights of scores, their sums, and the tokens that top-k, top-p, min-p and typical keep.

This is the meaning of kernels/cpu/sampling, which gives the same bits: every sum has an order, or is one of whole
numbers, which has none. Scores are logits less the largest of them, divided by the temperature.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]

# Weights are added up in single precision within blocks of so many, then in double precision.
BLOCK, _LANES = 256, 16
# Scores below weigh nothing: e^-60 of the best is far below what a random number of 53 bits tells apart.
_LOWEST = np.float32(-60.0)
# What sums of weights are counted in: of 2^18 tokens, a sum still fits into 63 bits.
_UNIT = 2.0**40
# 2^r for |r| <= 1/2 by Horner's rule: a minimax fit that is exact at 0, to 8.1e-8.
_POLYNOMIAL = np.array(
    [1.3274633093e-3, 9.6719618887e-3, 5.5506784469e-2, 2.4022234976e-1, 6.9314706326e-1, 1.0], dtype=np.float32
)
_MAGIC = np.float32(3 * 2**22 + 127)  # float32 numbers this large are whole, and end in the bits of an exponent


def exponential(scores: Scores) -> Scores:
    """e^x less e^-60 of scores (n,) that are at most 0; exactly 1 at 0, and 0 from -60 on.

    To 3 + |x| / 2 units of rounding: x is rounded to a power of two.
    """
    return _power(np.maximum(scores, _LOWEST)) - _power(_LOWEST[None])


def _power(x: Scores) -> Scores:
    # Products and sums are rounded one by one, as no fused ones can be written in numpy.
    exponent = x * np.float32(1.44269504088896341)
    shifted = exponent + _MAGIC
    rest = exponent - (shifted - _MAGIC)
    value = np.full_like(rest, _POLYNOMIAL[0])
    for factor in _POLYNOMIAL[1:]:
        value = value * rest + factor
    found: Scores = value * (shifted.view(np.int32) << np.int32(23)).view(np.float32)
    return found


def scaled(logits: Scores, best: np.float32, factor: float) -> Scores:
    """Scores of logits (n,), the largest of which is `best`; the factor is 1 / temperature."""
    with np.errstate(over="ignore"):  # what is minus infinity after the division is as improbable as it gets
        scores: Scores = (logits - best) * np.float32(factor)
    return scores


def block_sums(weights: Scores) -> npt.NDArray[np.float64]:
    """Running sums (blocks,) of weights (n,), at the end of every block."""
    padded = np.zeros(-(-weights.size // BLOCK) * BLOCK, np.float32)
    padded[: weights.size] = weights
    rows = padded.reshape(-1, BLOCK // _LANES, _LANES)
    sums = rows[:, 0]
    for row in range(1, BLOCK // _LANES):
        sums = sums + rows[:, row]
    for half in (8, 4, 2, 1):
        sums = sums[:, :half] + sums[:, half : 2 * half]
    return sums[:, 0].astype(np.float64).cumsum()


def draw(weights: npt.NDArray[np.floating], uniform: float) -> int:
    """The index that a number in [0, 1) means: each as often as its weight (n,) says."""
    # Inverse transform sampling in two levels: a running sum over all would take eight times as long. The first of
    # whatever has a running sum above u (times the total) never has probability zero.
    if weights.dtype == np.float32:
        sums = block_sums(weights)
    else:
        sums = np.add.reduceat(weights, np.arange(0, weights.size, BLOCK), dtype=np.float64).cumsum()
    target = uniform * sums[-1]  # below sums[-1], as u < 1
    block = int(sums.searchsorted(target, side="right"))
    inside = weights[block * BLOCK : (block + 1) * BLOCK].cumsum(dtype=np.float64)
    if block:
        inside += sums[block - 1]
    index = int(inside.searchsorted(target, side="right"))
    if index == inside.size:  # added up in another order, the block just misses the target
        index = int(weights[block * BLOCK : (block + 1) * BLOCK].nonzero()[0][-1])
    return index + block * BLOCK


def keep_top_k(logits: Scores, k: int) -> Indices:
    """Indices, ascending, of the k largest of logits (V,); ties with the k-th are kept."""
    if k >= logits.size:
        return np.arange(logits.size)
    # The k-th largest of the maxima of groups is not above the k-th largest score: a cheap first cut.
    width = max(1, min(64, logits.size // k))
    groups = logits[: logits.size // width * width].reshape(width, -1).max(axis=0)
    candidates = np.flatnonzero(logits >= np.partition(groups, groups.size - k)[groups.size - k])
    values = logits[candidates]
    kept: Indices = candidates[values >= np.partition(values, values.size - k)[values.size - k]]
    return kept


def keep_top_p(scores: Scores, p: float) -> Indices:
    """Indices, ascending, of the nucleus of scores (V,): the fewest most probable tokens that together reach p.

    The most probable token stays. Of equal weights the larger scores come first, of equal scores those first in the
    vocabulary.
    """
    largest = scores.max()
    weights = exponential(scores - largest if largest else scores)
    total = float(block_sums(weights)[-1])
    # Sorting is the dear part, so first cut what is improbable: the tokens above any threshold hold the nucleus if they
    # reach p together.
    for threshold in (1e-3 * total, 1e-5 * total, 0.0):
        candidates = np.flatnonzero(weights >= np.float32(min(1.0, threshold)))
        shares = _shares(weights[candidates])
        if shares.sum() >= int(p * total * _UNIT):
            break
    return candidates[_fewest(shares, p * total, -scores[candidates], -weights[candidates])]


def keep_typical(scores: Scores, p: float) -> Indices:
    """Indices, ascending, of the fewest scores (n,) that together reach probability p, those first whose information is
    nearest to the expected one (Meister et al. 2022, "Locally typical sampling", arXiv:2202.00666)."""
    weights = exponential(scores - scores.max())
    total = float(block_sums(weights)[-1])
    # A token's information is log(total) - score, and the entropy log(total) less the mean score: so log(total) goes.
    exact = np.where(weights > 0, scores, np.float32(0)).astype(np.float64)
    mean = float((exact * weights).cumsum()[-1]) / total
    return _fewest(_shares(weights), p * total, np.abs(scores.astype(np.float64) - mean))


def keep_min_p(scores: Scores, p: float) -> Indices:
    """Indices, ascending, of the scores (V,) at least p times as probable as the most probable."""
    # Probability ratios are differences of logits, so no softmax is needed.
    return np.flatnonzero(scores >= scores.max() + np.float32(math.log(p)))


def _shares(weights: Scores) -> npt.NDArray[np.int64]:
    return (weights.astype(np.float64) * _UNIT).astype(np.int64)


def _fewest(shares: npt.NDArray[np.int64], reach: float, *keys: npt.NDArray[np.floating]) -> Indices:
    """Indices, ascending, of those with the smallest keys (n,), the last key first, whose shares (n,) reach a sum; at
    least one."""
    order = np.lexsort((np.arange(shares.size), *keys))
    count = int(shares[order].cumsum().searchsorted(int(reach * _UNIT), side="left")) + 1
    kept: Indices = np.sort(order[:count])
    return kept
