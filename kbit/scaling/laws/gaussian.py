"""Formats on Gaussian weights: what can be said of a format before anything is quantized.

Trained weights are close to normal within a row, so the relative squared error of rounding a normal sample predicts
that of a matrix, and it needs no model (Panferov et al., "Unified Scaling Laws for Compressed Representations", 2025,
predict a format's capacity from it).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from kbit.formats.codebooks import codebook, quantile_codebook
from kbit.formats.quant_format import QuantFormat
from kbit.host.errors import UsageError

# Weights of the sample. The error of the 8-bit formats comes out to 1 %, that of the others better.
_SAMPLE = 1 << 17
# Row length that stands for "one scale per row".
ROW = 1024
_SEED = 7


@dataclass(frozen=True)
class Rounding:
    """What rounding to nearest in a format does to normal weights.

    Attributes:
        error: mean squared error over mean square.
        shift: mean error, in standard deviations of the weights: 0 but for sampling noise where the codebook is
            symmetric.
        noise: the share of the rounded weights' energy that is not the weights at another scale (forms.Target.noise).
        bits_per_weight: stored, scales included, in rows of ROW weights.
    """

    error: float
    shift: float
    noise: float
    bits_per_weight: float


@lru_cache(maxsize=512)
def gaussian_rounding(format: str) -> Rounding:
    """Round a normal sample in a format, with exact scales: their own rounding adds less than 1e-6 to the error.

    Raises:
        UsageError: `format` is no format string, or "original".
    """
    if format == "original":
        raise UsageError("the model as it is has no rounding error: name a format, as in nf4-b64")
    parsed = QuantFormat.parse(format)
    block = parsed.block_size or ROW
    x = np.random.default_rng(_SEED).standard_normal(_SAMPLE // block * block)
    if parsed.has_own_codebook:
        levels = quantile_codebook(np.sort(x).astype(np.float32), parsed.bits)
    else:
        levels = codebook(parsed, block)
    used = np.unique(levels[levels >= -1.0]).astype(np.float64)
    blocks = x.reshape(-1, block)
    middle = np.zeros((len(blocks), 1))
    if parsed.asymmetric:
        middle = (blocks.max(axis=1, keepdims=True) + blocks.min(axis=1, keepdims=True)) / 2
    scale = np.abs(blocks - middle).max(axis=1, keepdims=True)
    rounded = used[np.searchsorted((used[1:] + used[:-1]) / 2, (blocks - middle) / scale)] * scale + middle
    error = float(np.square(blocks - rounded).sum() / np.square(x).sum())
    shift = float((rounded - blocks).mean() / x.std())
    gain = float((blocks * rounded).sum() / np.square(x).sum())
    return Rounding(error, shift, noise_share(error, gain), parsed.bits_per_weight(ROW, ROW))


def noise_share(error: float, gain: float) -> float:
    """How much of what rounded weights q hold is noise: 1 - cos^2 of the angle between them and the weights w.

    q = gain w + noise, the noise orthogonal to w. What a matrix at another scale does to a model is undone by the next
    norm, or nearly, so the noise against the signal is what counts; the squared error of coarse formats is in good part
    gain (int2 in blocks of 128 leaves 0.82 of the weights).

    Args:
        error: |q - w|^2 / |w|^2.
        gain: <w, q> / <w, w>.
    """
    noise = max(error - (1 - gain) ** 2, 0.0)
    return noise / (noise + gain**2) if noise else 0.0
