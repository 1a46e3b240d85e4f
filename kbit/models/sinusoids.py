"""Tables of positions that are computed: sines in the first half of the features, cosines in the second.

Vaswani et al. 2017 (arXiv:1706.03762), whose sines and cosines take turns. Marian's frequencies are 10000^(-2i/K);
those of fairseq (M2M-100, NLLB), as of tensor2tensor, go down to 1/10000 itself, and are rounded to float32 as they
were in training.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kbit.models.spec import Sinusoids


def sinusoids(rows: int, width: int, kind: Sinusoids) -> NDArray[np.float32]:
    """Row p is that of position p: (rows, width).

    Args:
        rows: of the table.
        width: K, features of a row.
        kind: whose frequencies.
    """
    half = width // 2
    if kind == "fairseq":
        exponents = np.arange(half, dtype=np.float32) * np.float32(-np.log(10000.0) / (half - 1))
        powers = np.exp(exponents.astype(np.float64)).astype(np.float32)
        angles = (np.arange(rows, dtype=np.float32)[:, None] * powers).astype(np.float64)
        parts = [np.sin(angles), np.cos(angles), np.zeros((rows, width - 2 * half))]
    else:
        exact = np.arange(rows)[:, None] / np.power(10000.0, 2 * np.arange(width - half) / width)
        parts = [np.sin(exact), np.cos(exact[:, :half])]
    return np.concatenate(parts, axis=1).astype(np.float32)
