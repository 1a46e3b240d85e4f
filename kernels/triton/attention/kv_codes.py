"""Device functions that read the pages of `kv_layout`: words, codes, and the fp16 values that go into tensor cores.

A slab is 16 features of a tile of tokens. Its values come out as half levels, level / 2 (at 8 bits: the level): small
multiples of 1/2, exact in fp16. The fp16 scale of a group is applied by the caller, together with the factor 2.

Decoding costs no conversion instruction: a code that lies at bit p of a 16-bit half becomes the mantissa of an fp16
number with exponent 2^(10 - p), so `word & mask | magic` is 2^(10 - p) + code, and one exact subtraction centres it.
With 2^(10 - p) + (2^k - 1) / 2 exact in fp16 for p >= 1, codes of up to 4 bits are moved to p = 1 or 2 and above.
Words of 32 bits hold two halves: one shift, AND and OR serve a slab and the slab half a word further.
"""

from __future__ import annotations

import triton
import triton.language as tl

PAGE = tl.constexpr(64)  # kv_layout.PAGE


@triton.constexpr_function
def part_size(head_dim: int) -> int:
    """Features of the parts of a head (kv_layout.part_of). The functions below take those of a part for head_dim, or
    of the part of one that a program has (kv_layout.program_part)."""
    if head_dim <= 256:
        return head_dim
    size = 256
    while head_dim % size:
        size -= 32
    return size


@triton.constexpr_function
def chunk_size(head_dim: int, width: int, start: int) -> int:
    """Features of the chunk of a plane that begins at feature `start` (kv_layout.chunks)."""
    return min(512 // width, 256, 1 << ((head_dim - start).bit_length() - 1))


@triton.constexpr_function
def chunk_start(head_dim: int, width: int, index: int) -> int:
    """First feature of a plane's chunk."""
    start = 0
    for _ in range(index):
        start += min(512 // width, 256, 1 << ((head_dim - start).bit_length() - 1))
    return start


@triton.constexpr_function
def chunk_count(head_dim: int, width: int) -> int:
    """Chunks of a plane."""
    start, count = 0, 0
    while start < head_dim:
        start += min(512 // width, 256, 1 << ((head_dim - start).bit_length() - 1))
        count += 1
    return count


@triton.constexpr_function
def chunk_of(head_dim: int, width: int, slab: int) -> int:
    """Index of the chunk that holds a slab."""
    start, count = 0, 0
    while True:
        start += min(512 // width, 256, 1 << ((head_dim - start).bit_length() - 1))
        if slab * 16 < start:
            return count
        count += 1


@triton.constexpr_function
def scale_group(head_dim: int) -> int:
    """Features of a scale (reference.kv_group)."""
    return 32 if head_dim % 32 == 0 else 16


@triton.constexpr_function
def group_at(head_dim: int, bits: int, place: int) -> int:
    """The order in which to go through the scale groups of a token, so that slabs which share instructions follow each
    other: in a chunk with 32 bits per lane, a group and then the one half a chunk further. Else their common
    intermediate results would wait in registers (64 of them at 4 bits and D = 128, which made spills)."""
    width = 2 if bits == 3 else bits
    group = 32 if head_dim % 32 == 0 else 16
    start = 0
    while True:
        size = min(512 // width, 256, 1 << ((head_dim - start).bit_length() - 1))
        if place * group < start + size:
            break
        start += size
    count = size // group
    if size // 16 * width < 32 or count < 2:
        return place
    local = place - start // group
    return start // group + local % 2 * (count // 2) + local // 2


@triton.constexpr_function
def place_of(head_dim: int, bits: int, group: int) -> int:
    """The reverse of group_at."""
    size = 32 if head_dim % 32 == 0 else 16
    for place in range(head_dim // size):
        if group_at(head_dim, bits, place) == group:
            return place
    return -1


@triton.constexpr_function
def power_above(number: int) -> int:
    """The smallest power of two above a number."""
    return 1 << number.bit_length()


@triton.constexpr_function
def power_below(number: int) -> int:
    """The largest power of two that a positive number reaches."""
    return 1 << (number.bit_length() - 1)


@triton.constexpr_function
def exponent(number: int) -> int:
    """Of a power of two."""
    return number.bit_length() - 1


@triton.constexpr_function
def low_width(bits: int) -> int:
    """Width of the first plane of a code."""
    return 2 if bits == 3 else bits


@triton.constexpr_function
def page_bytes(head_dim: int, bits: int) -> int:
    """Of one head (KVFormat.page_bytes)."""
    groups = 0 if bits == 16 else head_dim // (32 if head_dim % 32 == 0 else 16)
    return 64 * (head_dim * bits // 8 + 2 * groups)


@triton.jit
def lane_words(
    plane, part, place, D: tl.constexpr, PART: tl.constexpr, WIDTH: tl.constexpr, START: tl.constexpr,
    TOKENS_LAST: tl.constexpr,
):  # fmt: skip
    """The words of one chunk of a plane, or the bits of a larger chunk's that belong to a part.

    Args:
        plane: pointer to bytes, where the plane begins in a head's page.
        part: which part of the head.
        place: (BN,) tokens within the page.
        D: features of the whole head.
        PART: features of a part.
        START: first feature of the chunk, in its part.
        TOKENS_LAST: lanes by tokens (keys) or tokens by lanes (values).

    Returns:
        int32 (16, BN) or (BN, 16): every lane's codes from bit 0 on; what lies above them is not cleared.
    """
    LANE_BITS: tl.constexpr = chunk_size(PART, WIDTH, START) // 16 * WIDTH
    ROW: tl.constexpr = D * WIDTH // 8
    FIRST: tl.constexpr = START * WIDTH // 8
    CHUNK: tl.constexpr = chunk_size(part_size(D), WIDTH, 0)
    lane = tl.arange(0, 16)
    # The compiler must see that neighbouring lanes lie side by side, so units are counted, not found from bits.
    UNIT: tl.constexpr = LANE_BITS // 8 if LANE_BITS > 8 else 1  # bytes of a load
    PER_UNIT: tl.constexpr = 8 // LANE_BITS if LANE_BITS < 8 else 1  # parts of lanes, or lanes, in one
    if PART < CHUNK:  # a lane's bits of this part lie among those of others
        SHARED: tl.constexpr = CHUNK // PART
        page = plane + part // SHARED * (CHUNK * WIDTH // 8)
        piece = lane * SHARED + part % SHARED
    else:
        page = plane + part * (PART * WIDTH // 8)
        piece = lane
    unit = piece // PER_UNIT
    base = page
    if UNIT == 2:
        base = page.to(tl.pointer_type(tl.int16), bitcast=True)
    elif UNIT == 4:
        base = page.to(tl.pointer_type(tl.int32), bitcast=True)
    if TOKENS_LAST:
        at = place[None, :] * (ROW // UNIT) + (FIRST // UNIT + unit)[:, None]
    else:
        at = place[:, None] * (ROW // UNIT) + (FIRST // UNIT + unit)[None, :]
    word = tl.load(base + at).to(tl.int32)
    if LANE_BITS < 8:
        shift = (piece % PER_UNIT) * LANE_BITS
        word = word >> (shift[:, None] if TOKENS_LAST else shift[None, :])
    return word


@triton.jit
def load_words(
    page, part, place, D: tl.constexpr, PART: tl.constexpr, BITS: tl.constexpr, TOKENS_LAST: tl.constexpr
):  # fmt: skip
    """A tuple of the words of every chunk of every plane, low bits first, of a head's part; arguments as for
    lane_words."""
    words = ()
    LOW: tl.constexpr = low_width(BITS)
    for chunk in tl.static_range(chunk_count(PART, LOW)):
        words = words + (lane_words(page, part, place, D, PART, LOW, chunk_start(PART, LOW, chunk), TOKENS_LAST),)
    if BITS == 3:
        top = page + PAGE * (D * 2 // 8)
        for chunk in tl.static_range(chunk_count(PART, 1)):
            words = words + (lane_words(top, part, place, D, PART, 1, chunk_start(PART, 1, chunk), TOKENS_LAST),)
    return words


@triton.jit
def scales_of(page, part, place, D: tl.constexpr, PART: tl.constexpr, BITS: tl.constexpr):
    """(BN,) pointers to the fp16 scales of tokens' first group of a part; the next group's are PAGE further."""
    scales = (page + PAGE * (D * BITS // 8)).to(tl.pointer_type(tl.float16), bitcast=True)
    return scales + part * (PART // scale_group(PART) * PAGE) + place


@triton.jit
def shifted(word, RIGHT: tl.constexpr):
    """word >> RIGHT, or << -RIGHT."""
    if RIGHT > 0:
        word = word >> RIGHT
    elif RIGHT < 0:
        word = word << (0 - RIGHT)
    return word


@triton.jit
def half_levels(words, D: tl.constexpr, BITS: tl.constexpr, SLAB: tl.constexpr):
    """A slab's values without their scale, in fp16 (exact): level / 2, at 8 bits the level.

    Args:
        words: what load_words returned.
        SLAB: which 16 features.
    """
    LOW: tl.constexpr = low_width(BITS)
    CHUNK: tl.constexpr = chunk_of(D, LOW, SLAB)
    START: tl.constexpr = chunk_start(D, LOW, CHUNK)
    INDEX: tl.constexpr = SLAB - START // 16
    # the upper half of a 32-bit word goes through the same instructions as the lower one
    UPPER: tl.constexpr = INDEX * LOW >= 16
    J: tl.constexpr = INDEX - 16 // LOW if UPPER else INDEX
    PER_BYTE: tl.constexpr = 8 // LOW
    P: tl.constexpr = 0 if BITS == 8 else J % PER_BYTE * LOW + (2 if LOW == 4 else 1)
    RIGHT: tl.constexpr = J * LOW - P
    BOTH: tl.constexpr = 0x00010001
    x = shifted(words[CHUNK], RIGHT) & (((1 << LOW) - 1 << P) * BOTH)
    if BITS == 3:
        TOP_CHUNK: tl.constexpr = chunk_of(D, 1, SLAB)
        TOP_INDEX: tl.constexpr = SLAB - chunk_start(D, 1, TOP_CHUNK) // 16
        # bit TOP_INDEX of the word goes to bit P + 2 of the half that x uses
        TOP_RIGHT: tl.constexpr = TOP_INDEX - (P + 2 + (16 if UPPER else 0))
        top = shifted(words[chunk_count(D, 2) + TOP_CHUNK], TOP_RIGHT)
        x = x | (top & ((4 << P) * (0x10000 if UPPER else 1)))
    x = x | (((25 - P) << 10) * BOTH)
    if UPPER:
        x = x >> 16
    MIDDLE: tl.constexpr = 128.0 if BITS == 8 else ((1 << BITS) - 1) * 0.5
    return x.to(tl.int16).to(tl.float16, bitcast=True) - (2.0 ** (10 - P) + MIDDLE)


@triton.jit
def hadamard_columns(GROUP: tl.constexpr, FIRST: tl.constexpr, COLUMNS: tl.constexpr):
    """Columns [FIRST, FIRST + COLUMNS) of the Walsh-Hadamard matrix: float32 (GROUP, COLUMNS) of +1 and -1."""
    parity = tl.arange(0, GROUP)[:, None] & (FIRST + tl.arange(0, COLUMNS))[None, :]
    parity = parity ^ (parity >> 4)
    parity = parity ^ (parity >> 2)
    parity = parity ^ (parity >> 1)
    return 1.0 - 2.0 * (parity & 1).to(tl.float32)
