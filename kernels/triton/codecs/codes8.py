"""From words of codes to 8-bit operands of the tensor cores: what products with rounded activations decode with.

An operand register of mma.m16n8k32 (and of wgmma with 8-bit operands) holds four neighbouring columns of a row, a byte
each. The codes of an integer format are moved to their bytes four at a time, by shifts and masks of whole words: no
byte is ever taken out by itself, and the compiler sees that the four bytes of a word are the register (read in the
machine code of sm_90: 0.75 instructions per weight at 4 bits; a code at a time it took 3.5). Which four columns share
a word follows from the layout of the planes (`layout`), so the columns are renamed, and the activations are written in
the same order when they are rounded (`order_of`):

    4 bits and more   16 columns in the order (t, k0, k8)
    2 and 3 bits      32 columns in the order (k8, t, k0, step)

Codebooks go through a table of bytes, a lookup per code (two codes at 2 and 3 bits) as in `codes`, and are named in the
first order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kbit.kernels.triton.codecs.codes import decode

# 128 in each byte, as int32. An argument of the kernels: mask and sign are then one LOP3 (see codes.MAGIC_FP16).
SIGNS = -0x7F7F7F80


def order_of(bits: int, kind: str) -> int:
    """Columns of a group in which activations are reordered for a weight: 32 or 16."""
    return 32 if kind == "int" and bits <= 3 else 16


@triton.jit
def moved(words, BY: tl.constexpr):
    """Bits moved up by BY, or down if it is negative."""
    if BY >= 0:  # noqa: SIM108
        out = words << BY
    else:
        out = words >> -BY
    return out


@triton.jit
def field(words, FROM: tl.constexpr, TO: tl.constexpr, WIDTH: tl.constexpr):
    """Of each byte, WIDTH bits from bit FROM on, at bit TO."""
    MASK: tl.constexpr = (((1 << WIDTH) - 1) << TO) * 0x01010101
    SIGNED: tl.constexpr = MASK - (1 << 32) if MASK >= (1 << 31) else MASK
    return moved(words, TO - FROM) & SIGNED


@triton.jit
def narrower(words, FROM: tl.constexpr, TO: tl.constexpr, WIDTH: tl.constexpr, WIDEST: tl.constexpr):
    """`field` of a narrower plane, once for each of the widest plane's words that a word serves: (W, 32, C OTHERS)."""
    OTHERS: tl.constexpr = WIDEST // WIDTH
    W: tl.constexpr = words.shape[0]
    C: tl.constexpr = words.shape[2]
    first = field(words, FROM, TO, WIDTH)
    second = field(words, FROM + WIDTH, TO, WIDTH)
    if OTHERS == 2:
        out = tl.join(first, second)
    else:
        tl.static_assert(OTHERS == 4)
        even = tl.join(first, field(words, FROM + 2 * WIDTH, TO, WIDTH))
        odd = tl.join(second, field(words, FROM + 3 * WIDTH, TO, WIDTH))
        out = tl.join(even, odd)
    return tl.reshape(out, (W, 32, C * OTHERS))


@triton.jit
def code_bytes(a, b, c, AT: tl.constexpr, LOW: tl.constexpr, BITS: tl.constexpr):
    """Codes whose fields are at bit AT of the bytes of the widest plane's words (2 to 7 bits), moved up to bit LOW."""
    A: tl.constexpr = 4 if BITS >= 4 else 2
    B: tl.constexpr = 2 if BITS >= 6 else 1
    out = field(a, AT, LOW, A)
    if BITS > A:
        out |= narrower(b, AT, LOW + A, B, A)
    if BITS == 7:
        out |= narrower(c, AT, LOW + A + B, 1, A)
    return out


@triton.jit
def code_words(a, b, c, LOW: tl.constexpr, BITS: tl.constexpr):
    """Codes of an integer format, a byte each, moved up to bit LOW: int32 (W, 32, S, R).

    S is groups of columns, 16 at 4 bits and more (R = n8: a word has k0 and k8), else 32 (R = (n8, k8): k0 and step).
    """
    W: tl.constexpr = a.shape[0]
    C: tl.constexpr = a.shape[2]
    if BITS == 8:
        # A word has two rows of two columns: those of one row come together from two words.
        k8 = tl.reshape(a, (W, 32, C // 2, 2))
        first, second = tl.split(k8)
        row = (first & 0x00FF00FF) | ((second << 8) & -0x00FF0100)
        next_row = ((first >> 8) & 0x00FF00FF) | (second & -0x00FF0100)
        out = tl.join(row, next_row)
    elif BITS >= 4:
        out = tl.join(code_bytes(a, b, c, 0, LOW, BITS), code_bytes(a, b, c, 4, LOW, BITS))
    else:
        row = tl.join(code_bytes(a, b, c, 0, LOW, BITS), code_bytes(a, b, c, 4, LOW, BITS))
        next_row = tl.join(code_bytes(a, b, c, 2, LOW, BITS), code_bytes(a, b, c, 6, LOW, BITS))
        out = tl.reshape(tl.permute(tl.join(row, next_row), (0, 1, 2, 4, 3)), (W, 32, C, 4))
    return out


@triton.jit
def int8_words(a, b, c, signs, BITS: tl.constexpr):
    """(code - 2^(BITS - 1)) 2^(8 - BITS) in two's complement: the code in the byte's upper bits, the highest turned."""
    return code_words(a, b, c, 8 - BITS, BITS) ^ signs


@triton.jit
def fp8_words(a, b, c, BITS: tl.constexpr):
    """(code - 2^(BITS - 1)) 2^-9 in e4m3, exact to 5 bits: bytes 0 to 16 are these multiples of 2^-9 themselves."""
    tl.static_assert(BITS <= 5)
    HALF: tl.constexpr = (1 << (BITS - 1)) * 0x01010101
    codes = code_words(a, b, c, 0, BITS)
    negative = (codes & HALF) ^ HALF
    one = negative >> (BITS - 1)
    # below 2^(BITS - 1) the magnitude is 2^(BITS - 1) - code: its bits turned, and one more
    magnitude = ((codes & (HALF - 0x01010101)) ^ (negative - one)) + one
    return magnitude | (negative << (8 - BITS))


@triton.jit
def table_bytes(a, b, c, values, BITS: tl.constexpr, KIND: tl.constexpr, STEPS: tl.constexpr):
    """Entries of a table of bytes (int8), or of pairs of them (int32, 16 bits apart): int8 (W, 32, STEPS, 8)."""
    W: tl.constexpr = a.shape[0]
    out = decode(a, b, c, values, 0, BITS, KIND, STEPS, tl.int16).to(tl.int8)  # ..., k8, n8, k0
    return tl.reshape(tl.permute(out, (0, 1, 2, 4, 3, 5)), (W, 32, STEPS, 8))


@triton.jit
def run(values, INDEX: tl.constexpr, COUNT: tl.constexpr):
    """The INDEX-th of COUNT (1, 2, 4, 8) equal runs of groups: (W, 32, S, R) -> (W, 32, S / COUNT, R)."""
    W: tl.constexpr = values.shape[0]
    S: tl.constexpr = values.shape[2]
    R: tl.constexpr = values.shape[3]
    if COUNT > 1:
        HALF: tl.constexpr = S // 2
        low, high = tl.split(tl.permute(tl.reshape(values, (W, 32, 2, HALF, R)), (0, 1, 3, 4, 2)))
        if INDEX < COUNT // 2:  # noqa: SIM108
            values = run(low, INDEX, COUNT // 2)
        else:
            values = run(high, INDEX - COUNT // 2, COUNT // 2)
    return values


@triton.jit
def words_operand(words, BITS: tl.constexpr):
    """`code_words` as int8 (W, 16, columns) in `order_of`'s order."""
    W: tl.constexpr = words.shape[0]
    S: tl.constexpr = words.shape[2]
    low = tl.join((words & 0xFF).to(tl.int8), ((words >> 8) & 0xFF).to(tl.int8))
    high = tl.join(((words >> 16) & 0xFF).to(tl.int8), ((words >> 24) & 0xFF).to(tl.int8))
    values = tl.join(low, high)  # ..., k8 or step, k0
    if BITS >= 4:
        values = tl.reshape(values, (W, 8, 4, S, 2, 2, 2))  # W, g, t, step, n8, k8, k0
        values = tl.reshape(tl.permute(values, (0, 4, 1, 3, 2, 6, 5)), (W, 16, 16 * S))
    else:
        values = tl.reshape(values, (W, 8, 4, S, 2, 2, 2, 2))  # W, g, t, two steps, n8, k8, step, k0
        values = tl.reshape(tl.permute(values, (0, 4, 1, 3, 5, 2, 7, 6)), (W, 16, 32 * S))
    return values


@triton.jit
def bytes_operand(values):
    """`table_bytes` as int8 (W, 16, columns), 16 columns in the order (t, k0, k8)."""
    W: tl.constexpr = values.shape[0]
    S: tl.constexpr = values.shape[2]
    values = tl.reshape(values, (W, 8, 4, S, 2, 2, 2))  # W, g, t, step, n8, k8, k0
    return tl.reshape(tl.permute(values, (0, 4, 1, 3, 2, 6, 5)), (W, 16, 16 * S))
