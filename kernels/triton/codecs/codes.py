"""From words of codes to the tensor cores' left operand: the device functions every product shares.

Shapes: W warps' worth of 16-row tiles, 32 lanes, C columns of a chunk, S = C / 16 steps. `load_plane` reads 128 bits
per lane, `aligned` and `fields` put a code together from its planes, `decode` makes values (W, 32, S, k8, n8, k0),
`operand` names them (rows, columns). All of it stays in the lane's registers: the last is a permutation that equals the
layout of the tensor core's operand, which the compiler sees and drops. (Read in the machine code of the GEMV for sm_80
to sm_120: no SHFL and no shared memory for the weights' words; tools/triton_lint gates it on sm_90.)

How a code becomes a value, chosen by what ptxas makes of it on sm_90 (docs/measurements.md):

- "int": code | 0x6400 is 1024 + code in half precision, two at a time, and one multiply-add for two takes the 1024 away
  (`levels`): few instructions, and few of them in the half-rate units that shift and mask. For bfloat16 0x4300 gives
  128 + code, up to 7 bits; 8 bits go through half precision.
- "table", one lookup per code with tl.gather from shared memory: 16 half-precision entries lie in 8 banks, so no two
  lanes meet in a bank with different words. With tl.load most instructions would be addresses.
- "pairs" (2 and 3 bits), one lookup for two codes: 16 or 64 entries of 32 bits, at most two of them in a bank. At 4
  bits the 256 entries need fewer instructions too, but lie 8 to a bank, so that lanes wait for each other.

The compiler packs two half-precision results of one word into one register without help, as long as both come from the
same 32-bit value by a truncation and a shift by 16 (`halves`).
"""

from __future__ import annotations

import triton
import triton.language as tl

# 1024 + code and 128 + code, twice. Passed to the kernels as an argument: with two immediate operands ptxas would split
# one LOP3 (code & mask | magic) into two.
MAGIC_FP16 = 0x64006400
MAGIC_BF16 = 0x43004300


@triton.jit
def load_piece(at, INDEX: tl.constexpr):
    """128 bits per lane of the INDEX-th piece: int32 (W, 32, 4)."""
    return tl.load(at + INDEX * 128, eviction_policy="evict_first")


@triton.jit
def load_plane(plane, first, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """All words of a chunk of COLUMNS columns: int32 (W, 32, 4 P), P = COLUMNS WIDTH / 256 pieces of 128 bits.

    Args:
        plane: pointer to a plane.
        first: int32 (W,), index of each row tile's first word of the chunk (a multiple of 128).
    """
    PIECES: tl.constexpr = COLUMNS * WIDTH // 256
    tl.static_assert(PIECES >= 1 and PIECES <= 8)
    W: tl.constexpr = first.shape[0]
    # One address for all pieces: the others lie at constant distances, which cost no instruction.
    at = plane + (first[:, None, None] + tl.arange(0, 32)[None, :, None] * 4 + tl.arange(0, 4)[None, None, :])
    if PIECES == 1:
        words = load_piece(at, 0)
    elif PIECES == 2:
        words = tl.permute(tl.join(load_piece(at, 0), load_piece(at, 1)), (0, 1, 3, 2))
    elif PIECES == 4:
        even = tl.join(load_piece(at, 0), load_piece(at, 2))
        odd = tl.join(load_piece(at, 1), load_piece(at, 3))
        words = tl.permute(tl.join(even, odd), (0, 1, 3, 4, 2))
    else:
        even = tl.join(tl.join(load_piece(at, 0), load_piece(at, 4)), tl.join(load_piece(at, 2), load_piece(at, 6)))
        odd = tl.join(tl.join(load_piece(at, 1), load_piece(at, 5)), tl.join(load_piece(at, 3), load_piece(at, 7)))
        words = tl.permute(tl.join(even, odd), (0, 1, 3, 4, 5, 2))
    return tl.reshape(words, (W, 32, 4 * PIECES))


@triton.jit
def load_planes(a_ptr, b_ptr, c_ptr, tile, chunk, padded_columns, BITS: tl.constexpr, COLUMNS: tl.constexpr):
    """The words of a chunk's planes, widest first, as `decode` takes them; the first again for one that BITS lacks.

    Args:
        a_ptr, b_ptr, c_ptr: pointers to the planes.
        tile: int32 (W,), row tiles.
        chunk: int32, scalar or (W,), which COLUMNS columns.
        padded_columns: K'.
    """
    A: tl.constexpr = 8 if BITS == 8 else (4 if BITS >= 4 else 2)
    B: tl.constexpr = 2 if BITS >= 6 else 1
    # a plane of width b has 16 rows' K' b / 2 words per tile, COLUMNS b / 2 per chunk
    first = tile * (padded_columns // 2) + chunk * (COLUMNS // 2)
    a = load_plane(a_ptr, first * A, A, COLUMNS)
    b = a
    c = a
    if BITS > A:
        b = load_plane(b_ptr, first * B, B, COLUMNS)
    if BITS == 7:
        c = load_plane(c_ptr, first, 1, COLUMNS)
    return a, b, c


@triton.jit
def beside(words, PLACE: tl.constexpr, WIDTH: tl.constexpr, WIDEST: tl.constexpr, HALF: tl.constexpr):
    """A narrower plane's words, one for each of the widest plane's, so that its fields lie PLACE bits above theirs.

    A word of the narrower plane serves WIDEST / WIDTH words of the widest: (W, 32, C) -> (W, 32, C WIDEST / WIDTH, 2),
    the last dimension for the fields in the first and second HALF bits, moved down.
    """
    W: tl.constexpr = words.shape[0]
    OTHERS: tl.constexpr = WIDEST // WIDTH
    if OTHERS == 2:
        first = tl.join(words << PLACE, words << (PLACE - WIDTH))
        second = tl.join(words >> (HALF - PLACE), words >> (HALF - PLACE + WIDTH))
        out = tl.join(first, second)  # (W, 32, C, 2, half)
    else:
        tl.static_assert(OTHERS == 4)
        even = tl.join(words << PLACE, words << (PLACE - 2 * WIDTH))
        odd = tl.join(words << (PLACE - WIDTH), words << (PLACE - 3 * WIDTH))
        first = tl.join(even, odd)
        even = tl.join(words >> (HALF - PLACE), words >> (HALF - PLACE + 2 * WIDTH))
        odd = tl.join(words >> (HALF - PLACE + WIDTH), words >> (HALF - PLACE + 3 * WIDTH))
        out = tl.join(first, tl.join(even, odd))  # (W, 32, C, 2, 2, half)
    return tl.reshape(out, (W, 32, words.shape[2] * OTHERS, 2))


@triton.jit
def halved(words, SHIFT: tl.constexpr):
    """(..., 2): words, and words moved down."""
    return tl.join(words, words >> SHIFT)


@triton.jit
def aligned(a, b, c, BITS: tl.constexpr, ADJACENT: tl.constexpr):
    """Planes of one shape, (W, 32, C, 2), in which the fields of a pair differ in their place within the code only."""
    A: tl.constexpr = 8 if BITS == 8 else (4 if BITS >= 4 else 2)
    B: tl.constexpr = 2 if BITS >= 6 else 1
    SPAN: tl.constexpr = 2 if ADJACENT else 1
    HALF: tl.constexpr = 8 * SPAN
    if BITS > A:
        b = beside(b, A * SPAN, B * SPAN, A * SPAN, HALF)
    if BITS == 7:
        c = beside(c, A + B, 1, A, HALF)
    a = halved(a, HALF)
    if BITS <= A:
        b = a
    if BITS < 7 or BITS == 8:
        c = a
    return a, b, c


@triton.jit
def fields(a, b, c, start, FROM: tl.constexpr, BITS: tl.constexpr, ADJACENT: tl.constexpr):
    """Codes (of a pair) at bit FROM of `aligned` words, ORed with start: one LOP3 per plane."""
    A: tl.constexpr = 8 if BITS == 8 else (4 if BITS >= 4 else 2)
    B: tl.constexpr = (2 if BITS >= 6 else 1) if BITS > A else 0
    SPAN: tl.constexpr = 2 if ADJACENT else 1
    COPY: tl.constexpr = 1 if ADJACENT else 0x10001
    codes = (a & ((((1 << (A * SPAN)) - 1) << FROM) * COPY)) | start
    if B > 0:
        codes |= b & ((((1 << (B * SPAN)) - 1) << (FROM + A * SPAN)) * COPY)
    if BITS == 7:
        codes |= c & ((1 << (FROM + A + B)) * COPY)
    return codes


@triton.jit
def halves(words, DTYPE: tl.constexpr):
    """int32 (...) as two 16-bit floats, (..., 2)."""
    low = (words & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True)
    high = (words >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    return tl.join(low, high)


@triton.jit
def level(a, b, c, magic, FROM: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """Codes at bit FROM of both halves of `aligned` words, minus 2^(BITS - 1): (...) -> DTYPE (..., 2), exact.

    code | magic is ONE + 2^FROM code; a multiply-add takes both away, so the code need not be shifted down.
    """
    ONE: tl.constexpr = 128.0 if DTYPE == tl.bfloat16 else 1024.0  # noqa: SIM300
    FACTOR: tl.constexpr = 2.0**-FROM
    ZERO: tl.constexpr = 2.0 ** (BITS - 1)
    value = halves(fields(a, b, c, magic, FROM, BITS, False), DTYPE)
    return value * tl.cast(FACTOR, DTYPE) - tl.cast(ONE * FACTOR + ZERO, DTYPE)


@triton.jit
def levels(a, b, c, magic, BITS: tl.constexpr, STEPS: tl.constexpr, DTYPE: tl.constexpr):
    """Integer codes minus 2^(BITS - 1): DTYPE (fp16 or bf16) (W, 32, STEPS, k8, n8, k0).

    Half precision has 10 bits after the leading one, so that a code of up to 6 bits can stay at bit 4 (of 3 bits at bit
    6); bfloat16 has 7.
    """
    W: tl.constexpr = a.shape[0]
    A: tl.constexpr = 8 if BITS == 8 else (4 if BITS >= 4 else 2)
    STAY: tl.constexpr = DTYPE == tl.float16 and BITS <= 6  # noqa: SIM300
    a, b, c = aligned(a, b, c, BITS, False)
    if A < 8 and not STAY:
        a, b, c = halved(a, 4), halved(b, 4), halved(c, 4)
    if A == 8 or (A == 4 and not STAY):
        out = level(a, b, c, magic, 0, BITS, DTYPE)
    elif A == 4:
        out = tl.join(level(a, b, c, magic, 0, BITS, DTYPE), level(a, b, c, magic, 4, BITS, DTYPE))
        out = tl.permute(out, (0, 1, 2, 3, 5, 4))
    elif not STAY:
        out = tl.join(level(a, b, c, magic, 0, BITS, DTYPE), level(a, b, c, magic, 2, BITS, DTYPE))
        out = tl.permute(out, (0, 1, 2, 3, 4, 6, 5))
    else:
        even = tl.join(level(a, b, c, magic, 0, BITS, DTYPE), level(a, b, c, magic, 4, BITS, DTYPE))
        odd = tl.join(level(a, b, c, magic, 2, BITS, DTYPE), level(a, b, c, magic, 6, BITS, DTYPE))
        out = tl.permute(tl.join(even, odd), (0, 1, 2, 3, 5, 6, 4))
    return tl.reshape(out, (W, 32, STEPS, 2, 2, 2))


@triton.jit
def load_table(table, KIND: tl.constexpr, BITS: tl.constexpr):
    """The table of a weight, in registers: by code, or by pair of codes; for "int" an unused scalar."""
    if KIND == "int":
        values = 0
    elif KIND == "table" or KIND == "nested":
        values = tl.load(table + tl.arange(0, 1 << BITS))
    elif KIND == "nested-pairs":  # by the bytes that `nested.load_words` has for pairs
        values = tl.load(table + tl.arange(0, 16 if BITS == 2 else 128))
    else:
        values = tl.load(table + tl.arange(0, 1 << (2 * BITS)))
    return values


@triton.jit
def decode(a, b, c, values, magic, BITS: tl.constexpr, KIND: tl.constexpr, STEPS: tl.constexpr, DTYPE: tl.constexpr):
    """Words of the planes -> values (W, 32, STEPS, 2, 2, 2) of type DTYPE, before scale and multiplier.

    Args:
        a, b, c: words of the planes, widest first (`load_planes`); those a width does not have are ignored.
        values: `load_table`.
        magic: MAGIC_BF16 for int codes below 8 bits in bfloat16, else MAGIC_FP16.
    """
    A: tl.constexpr = 8 if BITS == 8 else (4 if BITS >= 4 else 2)
    ADJACENT: tl.constexpr = KIND == "pairs"
    W: tl.constexpr = a.shape[0]
    if KIND == "int":
        if DTYPE == tl.bfloat16 and BITS < 8:  # noqa: SIM300
            out = levels(a, b, c, magic, BITS, STEPS, tl.bfloat16)
        else:
            out = levels(a, b, c, magic, BITS, STEPS, tl.float16).to(DTYPE)
    else:
        a, b, c = aligned(a, b, c, BITS, ADJACENT)
        if ADJACENT:
            a, b, c = halved(a, 8), halved(b, 8), halved(c, 8)
        if A <= 4:
            a, b, c = halved(a, 4), halved(b, 4), halved(c, 4)
        if A == 2 and not ADJACENT:
            a, b, c = halved(a, 2), halved(b, 2), halved(c, 2)
        codes = fields(a, b, c, 0, 0, BITS, ADJACENT)
        if ADJACENT:
            codes = tl.gather(values, tl.reshape(codes, (W * STEPS * 128,)), 0)
            out = halves(tl.reshape(codes, (W, 32, STEPS, 2, 2)), DTYPE)
        else:
            codes = tl.join(codes, codes >> 16) & ((1 << BITS) - 1)
            out = tl.gather(values, tl.reshape(codes, (W * STEPS * 256,)), 0)
            out = tl.reshape(out, (W, 32, STEPS, 2, 2, 2))
    return out


@triton.jit
def part(values, INDEX: tl.constexpr, COUNT: tl.constexpr):
    """The INDEX-th of COUNT (1, 2, ..., 16) equal runs of steps: (W, 32, S, 2, 2, 2) -> (W, 32, S / COUNT, 2, 2, 2)."""
    W: tl.constexpr = values.shape[0]
    S: tl.constexpr = values.shape[2]
    if COUNT > 1:
        HALF: tl.constexpr = S // 2
        values = tl.reshape(values, (W, 32, 2, HALF, 2, 2, 2))
        low, high = tl.split(tl.permute(values, (0, 1, 3, 4, 5, 6, 2)))
        if INDEX < COUNT // 2:  # noqa: SIM108
            values = part(low, INDEX, COUNT // 2)
        else:
            values = part(high, INDEX - COUNT // 2, COUNT // 2)
    return values


@triton.jit
def operand(values, SWAP: tl.constexpr):
    """Values (W, 32, S, k8, n8, k0) as (W, 16, 16 S): rows (n8, g), columns of a step (k8, t, k0); if SWAP (t, k8, k0).

    SWAP goes with `swapped` on the activations. It is for operands with four neighbouring columns per lane instead of
    two (mma.m16n8k32 of int8; and Triton's choice for mma.m16n8k16 where a join is among the operand's producers, see
    `gemv.swaps`): then the lane's own columns 2 t, 2 t + 1, 2 t + 8, 2 t + 9 are called neighbours, in both operands.
    """
    W: tl.constexpr = values.shape[0]
    S: tl.constexpr = values.shape[2]
    values = tl.reshape(values, (W, 8, 4, S, 2, 2, 2))  # W, g, t, step, k8, n8, k0
    values = tl.permute(values, (0, 5, 1, 3, 2, 4, 6) if SWAP else (0, 5, 1, 3, 4, 2, 6))
    return tl.reshape(values, (W, 16, 16 * S))


@triton.jit
def swapped(x):
    """Activations (W, BM, C) with each step's columns in `operand`'s SWAP order."""
    W: tl.constexpr = x.shape[0]
    BM: tl.constexpr = x.shape[1]
    C: tl.constexpr = x.shape[2]
    x = tl.permute(tl.reshape(x, (W, BM, C // 16, 2, 4, 2)), (0, 1, 2, 4, 3, 5))
    return tl.reshape(x, (W, BM, C))


@triton.jit
def load_scale(
    scales, factors, chunk, tile, own_tile, row, padded_blocks, blocks,
    COLUMN: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """Scales (or offsets) of the block that holds column COLUMN of a chunk, float32, broadcast of the indices.

    Args:
        scales: pointer to (N' / 16, blocks', 16).
        factors: pointer to the superblocks' factors, used if DOUBLE.
        chunk: int32, index of the chunk of COLUMNS columns.
        tile: int32, index of the row tile among all that are stored.
        own_tile: int32, its index in its matrix (tiles of several experts are stored one after the other).
        row: int32, row in the tile.
        padded_blocks: blocks'.
        blocks: blocks of a row, without padding.
    """
    # Where a chunk holds whole blocks, their scales lie at constant distances from the first: one address for all.
    MORE: tl.constexpr = COLUMN // BLOCK if BLOCK > 0 and COLUMNS % BLOCK == 0 else 0
    if BLOCK == 0:  # one for the whole row
        block = chunk * 0
    elif COLUMNS % BLOCK == 0:
        block = chunk * (COLUMNS // BLOCK)
    elif BLOCK % COLUMNS == 0:
        block = chunk // (BLOCK // COLUMNS)
    else:
        block = (chunk * COLUMNS + COLUMN) // BLOCK
    values = tl.load(scales + ((tile * padded_blocks + block) * 16 + row) + MORE * 16).to(tl.float32)
    if DOUBLE:
        values *= tl.load(factors + ((own_tile * 16 + row) * blocks + block + MORE) // 256)
    return values
