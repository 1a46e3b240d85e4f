"""Nested codes on a GPU: from the planes of a width to its values (kbit/formats/nested.py).

Every plane lies by itself, so a width reads its own bytes only. A plane of b bits is int32 (N' / 16, K' b / 256, 32,
4), in the lanes' order that `layout` describes. Inside a word the bits of a weight begin at

    16 k8 + 8 n8 + 4 s + 2 k0        of the plane of two bits: a word has steps 2 j and 2 j + 1 (s)
    16 k8 + 8 n8 + 4 s + 2 k0 + o    of a plane of one bit, whose word serves words j = 2 i + o of the other

so that planes come together as words, not weight by weight: two planes of one bit are one of two bits after two
instructions for 16 weights, two of these are one of four after two for 8 (`interleaved`). In the end a word has four
bytes, each a code, or, at 2 and 3 bits, a pair of codes that one lookup serves (bit 5 of a pair of 3 bits is empty).
What a width lacks is nowhere: neither loaded nor masked.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kbit.kernels.triton.codecs.codes import halves, load_plane


@triton.jit
def interleaved(low, high, SHIFT: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Fields of two words as fields twice as wide, the high ones above: (...) -> (..., 2), even fields and odd ones.

    Args:
        SHIFT: bits of a field.
        LOW: the even fields.
        HIGH: what of the odd fields becomes part of the result.
    """
    even = (low & LOW) | ((high << SHIFT) & HIGH)
    odd = ((low >> SHIFT) & LOW) | (high & HIGH)
    return tl.join(even, odd)


@triton.jit
def two_bits(low, high):
    """Planes of one bit (W, 32, C) as a plane of two: (W, 32, 2 C)."""
    both = interleaved(low, high, 1, 0x55555555, -0x55555556)
    return tl.reshape(both, (low.shape[0], 32, 2 * low.shape[2]))


@triton.jit
def one_bit(plane):
    """A plane of one bit (W, 32, C) as the lower half of a plane of two, whose upper half is anything: (W, 32, 2 C)."""
    return tl.reshape(tl.join(plane, plane >> 1), (plane.shape[0], 32, 2 * plane.shape[2]))


@triton.jit
def halved_words(words):
    """Fields of four bits as bytes: (...) -> (..., 2), even fields and odd ones."""
    return tl.join(words & 0x0F0F0F0F, (words >> 4) & 0x0F0F0F0F)


@triton.jit
def load_high(planes, first, BITS: tl.constexpr, COLUMNS: tl.constexpr):
    """The bits of codes from the fifth on, as fields of four bits (anything in those that BITS lacks): int32 (W, 32,
    words, k0)."""
    fifth = load_plane(planes[3], first, 1, COLUMNS)
    if BITS == 5:  # noqa: SIM108
        pair = one_bit(fifth)
    else:
        pair = two_bits(fifth, load_plane(planes[4], first, 1, COLUMNS))
    if BITS <= 6:
        out = tl.join(pair, pair >> 2)
    else:
        seventh = load_plane(planes[5], first, 1, COLUMNS)
        if BITS == 7:  # noqa: SIM108
            further = one_bit(seventh)
        else:
            further = two_bits(seventh, load_plane(planes[6], first, 1, COLUMNS))
        out = interleaved(pair, further, 2, 0x33333333, -0x33333334)
    return out


@triton.jit
def load_words(planes, tile, chunk, padded_columns, BITS: tl.constexpr, COLUMNS: tl.constexpr):
    """Codes of a chunk of COLUMNS columns, or pairs of them, a byte each: int32 (W, 32, words, ..., 2), the dimensions
    behind the words being s at 2 and 3 bits, else k0 and s.

    Args:
        planes: pointers, of two bits and then of one.
        tile: int32 (W,), row tiles.
        chunk: int32, scalar or (W,).
        padded_columns: K'.
    """
    first = tile * (padded_columns // 2) + chunk * (COLUMNS // 2)
    low = load_plane(planes[0], first * 2, 2, COLUMNS)
    if BITS == 2:
        out = halved_words(low)
    elif BITS == 3:
        out = interleaved(low, one_bit(load_plane(planes[1], first, 1, COLUMNS)), 4, 0x0F0F0F0F, 0x50505050)
    else:
        middle = two_bits(load_plane(planes[1], first, 1, COLUMNS), load_plane(planes[2], first, 1, COLUMNS))
        nibbles = interleaved(low, middle, 2, 0x33333333, -0x33333334)
        if BITS == 4:
            out = halved_words(nibbles)
        else:
            high = load_high(planes, first, BITS, COLUMNS)
            ABOVE: tl.constexpr = -0x0F0F0F10 if BITS == 8 else ((1 << (BITS - 4)) - 1) * 0x10101010
            out = interleaved(nibbles, high, 4, 0x0F0F0F0F, ABOVE)
    return out


@triton.jit
def bytes_of(words):
    """(...) -> (..., n8, k8): the four bytes of each word."""
    low = tl.join(words & 0xFF, (words >> 8) & 0xFF)
    high = tl.join((words >> 16) & 0xFF, (words >> 24) & 0xFF)
    return tl.join(low, high)


@triton.jit
def codes_of_pairs(pairs, BITS: tl.constexpr):
    """Pairs of codes of 2 or 3 bits as two codes, (..., k0)."""
    first, second = pairs & 3, (pairs >> 2) & 3
    if BITS == 3:
        first |= (pairs >> 2) & 4
        second |= (pairs >> 4) & 4
    return tl.join(first, second)


@triton.jit
def load_nested(
    planes, tile, chunk, padded_columns, values, BITS: tl.constexpr, KIND: tl.constexpr, COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Values of a chunk, (W, 32, COLUMNS / 16, k8, n8, k0) of type DTYPE, before scale and multiplier.

    Args:
        planes, tile, chunk, padded_columns: see load_words.
        values: `codes.load_table`.
    """
    STEPS: tl.constexpr = COLUMNS // 16
    found = bytes_of(load_words(planes, tile, chunk, padded_columns, BITS, COLUMNS))
    W: tl.constexpr = found.shape[0]
    if KIND == "nested-pairs":
        pairs = tl.permute(found, (0, 1, 2, 3, 5, 4))  # W, lane, word, s, k8, n8
        entries = tl.gather(values, tl.reshape(pairs, (W * STEPS * 128,)), 0)
        out = halves(tl.reshape(entries, (W, 32, STEPS, 2, 2)), DTYPE)
    else:
        if BITS <= 3:
            codes = codes_of_pairs(tl.permute(found, (0, 1, 2, 3, 5, 4)), BITS)
        else:
            codes = tl.permute(found, (0, 1, 2, 4, 6, 5, 3))  # of W, lane, word, k0, s, n8, k8
        out = tl.gather(values, tl.reshape(codes, (W * STEPS * 256,)), 0)
        out = tl.reshape(out, (W, 32, STEPS, 2, 2, 2))
    return out
