"""Taking codes out of words and putting them in, without a loop over rows."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

_WORD_BITS = 32
# Planes of the widths that GPTQModel keeps in planes: (bits of the plane, its place in the code).
_PLANES = {5: ((4, 0), (1, 4)), 6: ((4, 0), (2, 4)), 7: ((4, 0), (2, 4), (1, 6))}


def stream(words: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """Rows that are streams of `bits`-bit codes, the first in the lowest bits of the first word.

    Args:
        words: (R, W) of any integer type, or bytes; W words hold whole runs of 8 codes.
        bits: 1 to 8.

    Returns:
        uint8 (R, W * width of a word / bits).
    """
    from kbit import _native

    data = _bytes(words)
    if bits == 8:
        return data
    if bits in (1, 2, 4):  # whole codes in every byte
        codes = np.empty((data.shape[0], data.shape[1] * 8 // bits), dtype=np.uint8)
        _native.unpack_plane(data, bits, 0, True, codes)
        return codes
    codes = np.empty((data.shape[0], data.shape[1] // bits * 8), dtype=np.uint8)
    _native.unpack_stream(data, bits, codes)
    return codes


def stream_words(codes: NDArray[np.uint8], bits: int) -> NDArray[np.int32]:
    """What `stream` undoes: codes (R, K) as streams of 32-bit words, (R, ceil(K bits / 32)), zeros behind the last."""
    rows, columns = codes.shape
    padded = np.ascontiguousarray(np.pad(codes, ((0, 0), (0, -columns % _WORD_BITS))))
    words = -(-columns * bits // _WORD_BITS)
    if bits in (1, 2, 4, 8):
        from kbit import _native

        data = np.empty((rows, padded.shape[1] * bits // 8), dtype=np.uint8)
        _native.pack_plane(padded, bits, 0, data)
    else:
        numbers = np.zeros((rows, padded.shape[1] // 8), dtype="<u8")
        for place in range(8):
            numbers |= padded[:, place::8].astype(np.uint64) << np.uint64(place * bits)
        data = np.ascontiguousarray(numbers.view(np.uint8).reshape(rows, -1, 8)[..., :bits]).reshape(rows, -1)
    return np.ascontiguousarray(data.view(np.int32)[:, :words])


def padded_words(words: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """As `stream`, of 32-bit words of as many whole codes as fit them, padded above: (R, W * (32 // bits))."""
    unsigned = np.ascontiguousarray(words).view(np.uint32)
    per_word = _WORD_BITS // bits
    codes = np.empty((*unsigned.shape, per_word), dtype=np.uint8)
    mask = np.uint32((1 << bits) - 1)
    for place in range(per_word):
        codes[..., place] = (unsigned >> np.uint32(place * bits)) & mask
    return codes.reshape(words.shape[0], -1)


def planar(words: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """As `stream`, of runs of 32 codes kept in planes, widest first: GPTQModel's 5, 6 and 7 bits (planar_packing.py).

    Args:
        words: 32-bit (R, W), W a multiple of bits.
    """
    rows = words.shape[0]
    runs = np.ascontiguousarray(words).reshape(rows, -1, bits)
    codes = np.zeros((rows, runs.shape[1] * _WORD_BITS), dtype=np.uint8)
    at = 0
    for width, place in _PLANES[bits]:
        plane = np.ascontiguousarray(runs[..., at : at + width]).reshape(rows, -1)
        codes |= stream(plane, width) << np.uint8(place)
        at += width
    return codes


def sliced(
    table: NDArray[Any], bits: int, slices: int, start: int, stop: int, *, highest_first: bool
) -> NDArray[np.uint8]:
    """Rows of a matrix of codes that was cut into slices of as many rows, laid one upon another in the bits of a table.

    Args:
        table: integers (R, K).
        bits: of a code.
        slices: how many there are: row i of the matrix is row i % R of the table, in slice i // R.
        start, stop: rows of the matrix.
        highest_first: whether the first slice is in the highest bits that are used, or in the lowest.

    Returns:
        uint8 (stop - start, K).
    """
    step, columns = table.shape
    codes = np.empty((stop - start, columns), dtype=np.uint8)
    mask, at = table.dtype.type((1 << bits) - 1), start
    while at < stop:
        place, first = divmod(at, step)
        count = min(stop - at, step - first)
        shift = bits * (slices - 1 - place if highest_first else place)
        part = table[first : first + count] >> table.dtype.type(shift)
        np.bitwise_and(part, mask, out=codes[at - start :][:count], casting="unsafe")
        at += count
    return codes


def _bytes(words: NDArray[Any]) -> NDArray[np.uint8]:
    """Words as their bytes, lowest first: files and the machines that kbit runs on agree on that."""
    assert sys.byteorder == "little"
    data: NDArray[np.uint8] = np.ascontiguousarray(words).view(np.uint8)
    return data.reshape(words.shape[0], -1)
