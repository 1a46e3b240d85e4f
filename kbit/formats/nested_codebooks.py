"""Codebooks of nested widths: the cells of the narrowest are Lloyd-Max's, and every further bit cuts each in two.

A normal source is successively refinable, and so, nearly, are its scalar codebooks: at 3, 4 and 5 bits the cells of 2
bits, cut again and again where that leaves the least error, have 1.005, 1.004 and 1.015 times the squared error of
codebooks made for those widths (absmax blocks of 64; tests/formats/test_nested.py).
"""

from __future__ import annotations

import itertools
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from kbit.formats.lloyd import Moments, lloyd_codebook

# Levels of 8 bits lie on whole steps of the largest, so that kernels multiply them as single int8 digits. The error of
# that is the one that 8-bit integers have.
_INTEGER_BITS, _STEPS = 8, 127
_ITERATIONS = 200


@lru_cache(maxsize=64)
def nested_codebook(low: int, high: int, block_size: int) -> npt.NDArray[np.float32]:
    """The codebooks of widths low to high, one after another, each indexed by code, float32 (sum of 2^w,).

    Args:
        low, high: widths.
        block_size: weights per scale.
    """
    moments = Moments.of(block_size)
    magnitudes = lloyd_codebook(low, block_size)[2 ** (low - 1) :].astype(np.float64)
    borders = np.concatenate([[0.0], (magnitudes[:-1] + magnitudes[1:]) / 2, [1.0]])
    books = []
    for width in range(low, high + 1):
        if width > low:
            cuts = [_cut(moments, first, last) for first, last in itertools.pairwise(borders)]
            borders = np.sort(np.concatenate([borders, cuts]))
        mass, moment = moments.of_cells(borders)
        middle = (borders[:-1] + borders[1:]) / 2
        magnitudes = np.where(mass > 0, moment / np.where(mass > 0, mass, 1.0), middle)
        if width == _INTEGER_BITS:
            magnitudes = np.round(magnitudes / magnitudes[-1] * _STEPS) * (magnitudes[-1] / _STEPS)
        ascending = np.concatenate([-magnitudes[::-1], magnitudes]).astype(np.float32)
        book = np.empty_like(ascending)
        book[codes_of_places(width)] = ascending
        books.append(book)
    return np.concatenate(books)


def codes_of_places(width: int) -> npt.NDArray[np.int64]:
    """The code of each cell, cells counted upwards, int64 (2^width,).

    The two highest bits of the place are the code's lowest two, and the place's further ones follow, each above the
    last: so the lowest bits of a code are the code of the wider cell.
    """
    place = np.arange(2**width)
    code = place >> (width - 2)
    for bit in range(2, width):
        code |= ((place >> (width - 1 - bit)) & 1) << bit
    return code


def _cut(moments: Moments, first: float, last: float) -> float:
    """Where a cell is cut in two so that the squared error is least: half-way between the means of both sides."""
    cut = (first + last) / 2
    for _ in range(_ITERATIONS):
        mass, moment = moments.of_cells(np.array([first, cut, last]))
        if not (mass > 0).all():
            break
        means = moment / mass
        updated = float(means.mean())
        if abs(updated - cut) < 1e-9:
            break
        cut = updated
    return cut
