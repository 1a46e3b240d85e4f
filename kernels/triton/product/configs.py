"""Block sizes of the products: which configuration runs a problem on an architecture.

Chosen with the offline model of tools/triton_lint (instructions of the busiest SM against bytes over bandwidth, read
from the machine code), not by timing on a GPU. What a user timed (`kbit tune`) goes before it.
"""

from __future__ import annotations

from dataclasses import dataclass

from kbit.kernels.triton.codecs.layout import ROW_TILE, columns_multiple
from kbit.kernels.triton.tuned import preferred


@dataclass(frozen=True)
class GemvConfig:
    """Configuration of kernels/triton/product/gemv.py.

    Attributes:
        warps: of a program; each multiplies its own chunks of the program's 16 rows.
        columns: of a chunk, 64, 128 or 256: what a warp decodes between two loads.
        split: programs that share the columns of a row tile.
    """

    warps: int
    columns: int
    split: int = 1


@dataclass(frozen=True)
class GemmConfig:
    """Configuration of kernels/triton/product/gemm.py.

    Attributes:
        tiles: row tiles (16 rows) of a program.
        tokens: of a program, a power of two from 8.
        columns: of a chunk, 64, 128 or 256.
        split: programs that share the columns of a tile; divides the number of chunks.
        warps: of a program.
        stages: of the software pipeline.
    """

    tiles: int
    tokens: int
    columns: int
    split: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Problem:
    """A product x (M, K) W^T (N, K), as far as configurations depend on it.

    Attributes:
        tokens: M.
        rows: N', padded.
        columns: K', padded.
        bits: of the codes.
        block_size: columns that share a scale, 0 for a whole row.
        element_size: bytes of an activation.
        format: of the weight, as text. Nested ones have wider chunks; else only what was timed tells apart formats of
            the same bits, and gated products.
        gated: with an activation: of two matrices (gemv), or of a gate's product and this one (gemm).
    """

    tokens: int
    rows: int
    columns: int
    bits: int
    block_size: int
    element_size: int = 2
    format: str = ""
    gated: bool = False

    @property
    def least_columns(self) -> int:
        """Of a chunk: 128 bits a lane of every plane, and at least 64 columns."""
        nested = self.format.startswith("nested") and self.bits > 2
        return columns_multiple(3) if nested else columns_multiple(self.bits)  # planes of one bit, as 3 bits have


# Streaming multiprocessors (compute units) of the largest common part of a class: enough programs for these.
_UNITS = {"sm_80": 108, "sm_86": 84, "sm_89": 128, "sm_90": 132, "sm_100": 148, "sm_120": 170, "gfx90a": 110}
_UNITS |= {"gfx942": 304, "gfx1100": 96, "gfx1201": 64, "interpreter": 4}


# Left operands from registers, sums of 64 x 256 per four warps without a spill.
_WGMMA = ("sm_90",)


def units_of(arch: str) -> int:
    """Multiprocessors to fill on an architecture; 100 for one that is not in the table."""
    return _UNITS.get(arch, 100)


def chunk_columns(problem: Problem, limit: int = 256) -> int:
    """The widest chunk up to `limit` that divides K' and holds 128 bits per lane of every plane."""
    least = problem.least_columns
    for columns in (256, 128, 64):
        if columns <= max(limit, least) and columns >= least and problem.columns % columns == 0:
            return columns
    raise ValueError(f"{problem.columns} columns are not padded for {problem.bits} bits")


def gemv_candidates(arch: str, problem: Problem) -> list[GemvConfig]:
    """Configurations worth compiling or timing."""
    widths = sorted({chunk_columns(problem, limit) for limit in (64, 128, 256)})
    return [GemvConfig(warps, columns, split) for columns in widths for warps in (2, 4, 8) for split in (1, 2, 4)]


@preferred("gemv")
def gemv_config(arch: str, problem: Problem) -> GemvConfig:
    """The configuration of a product with few tokens.

    A chunk of 256 columns keeps 2 KB of 4-bit codes per warp in flight, so 16 warps cover the 16 KB per SM that an
    H100 needs (3.35 TB/s x 650 ns / 132). Warps share the columns of a row tile until each has two chunks; only
    matrices with few rows are split over several programs, which costs a second kernel.
    """
    # 8-bit codes take twice the registers' worth of words: 128 columns are as many bytes in flight.
    narrow = problem.bits >= 7 or problem.element_size == 4
    columns = chunk_columns(problem, 128 if narrow else 256)
    chunks = problem.columns // columns
    warps = 8 if chunks >= 8 else (4 if chunks >= 4 else 2)
    tiles = problem.rows // ROW_TILE
    split = 1
    while split < 8 and tiles * split < units_of(arch) and chunks >= 2 * split * warps:
        split *= 2
    return GemvConfig(warps, columns, split)


def gemm_candidates(arch: str, problem: Problem) -> list[GemmConfig]:
    """Configurations worth compiling or timing."""
    found = []
    shapes = ((2, 16, 2), (4, 16, 4), (4, 32, 4), (8, 32, 4), (8, 64, 4), (4, 128, 4), (8, 128, 8), (8, 256, 8))
    for tiles, tokens, warps in shapes:
        if tokens <= max(16, 2 * problem.tokens):
            columns = chunk_columns(problem, 64)
            splits = sorted({1, _split(arch, problem, tiles, tokens, columns)})
            found += [
                GemmConfig(tiles, tokens, columns, split, warps, stages) for split in splits for stages in (2, 3, 4)
            ]
    return found


@preferred("gemm")
def gemm_config(arch: str, problem: Problem) -> GemmConfig:
    """The configuration of a product with more tokens than the GEMV takes.

    Up to 64 tokens one program has them all, and the columns are split until every multiprocessor has a program.
    """
    columns = chunk_columns(problem, 64)
    # A chunk of 128 or 256 columns is two or four parts of x per stage, and as many more registers of weights.
    wide = columns > 64
    stages = 2 if wide or arch.startswith("gfx") else 3
    if problem.tokens <= 16:
        # 32 rows keep sm_100 on mma, which takes W from registers; its tcgen05 (from 64 rows) does not.
        tiles, tokens, warps = (2, 16, 2) if arch == "sm_100" else (4, 16, 4)
    elif problem.tokens <= 64 and arch in _WGMMA and not wide:
        tiles, tokens, warps = (8, 32, 4) if problem.tokens <= 32 else (8, 64, 4)
    elif problem.tokens <= 64:
        # With 64 tokens mma's warps would divide the tokens too, and W would go through shared memory.
        tiles, tokens, warps = (4, 32, 4) if wide or arch.startswith("gfx") else (8, 32, 4)
        if arch.startswith("gfx11") and columns == 256:  # 32 tokens spill
            tokens = 16
    elif arch.startswith("gfx1"):
        few, many = (32, 128) if arch.startswith("gfx12") else (16 if columns == 256 else 32, 64)  # more would spill
        tiles, tokens, warps = 4, few if wide else many, 4
    elif arch.startswith("gfx9") and columns == 256:
        tiles, tokens, warps = 4, 64, 4  # 128 tokens take 96 KB of shared memory, of 64
    elif arch == "sm_100" or arch.startswith("gfx") or (wide and (arch, problem.bits) != ("sm_80", 8)):
        tiles, tokens, warps = 4, 128, 4
    else:
        # Least work for the busiest multiprocessor; of equals the larger tile, which decodes each weight less often
        # (and with 8 bits in chunks of 256 on sm_80 spills nothing, where the smaller does).
        shapes = ((8, 256, 8), (8, 128, 8), (4, 128, 4))[0 if arch in _WGMMA else 1 :]
        tiles, tokens, warps = min(shapes, key=lambda s: _rounds(arch, problem, s[0], s[1]) * s[0] * s[1])
    return GemmConfig(tiles, tokens, columns, _split(arch, problem, tiles, tokens, columns), warps, stages)


def rounded_config(arch: str, problem: Problem, activations: str, segment: int) -> GemmConfig:
    """The configuration of kernels/triton/product/rounded.py.

    What the offline model says of 256 x 4096 x 4096 in microseconds, int4 in blocks of 64 (of 128), beside gemm's:

                sm_80  86   89   90          100         120  gfx90a  942         1100  1201
        gemm    58     155  52   9.3         11.8        54   77      14.8        82    44
        int8    48 (36)  43   15   11.1 (6.9)  14.8 (12.8)  14   58      14.9 (9.7)  79    25
        fp8                  26   7.4 (5.4)   7.3 (5.5)   27

    With 64 tokens gemm is bound by memory or close to it (3.1 on sm_90, of a floor of 2.9), which 8 bits do not change:
    hence limits.ROUNDED_TOKENS. On GeForce cards int8 is the faster of the two, and loses less; on sm_90 int8 wants
    blocks of 128, and fp8 is ahead of it at both; on sm_100 the compiler has no tcgen05 for integers, and int8 does not
    pay, nor does it on gfx11 and at a width of 256 columns a chunk (3, 5 and 7 bits) on AMD's.

    Args:
        arch, problem: as for gemm_config.
        activations: "int8" or "fp8".
        segment: columns whose products are summed before a scale; a chunk has whole ones.
    """
    columns = max(segment, chunk_columns(problem, 64))
    tiles = 4
    sizes: tuple[int, ...] = (64, 128)
    if arch.startswith("gfx1") and columns == 256:  # more would spill, here and in the next line
        tiles, sizes = 2, (32,)
    elif arch.startswith("gfx1"):
        sizes = ((128 if arch.startswith("gfx12") else 64) * 64 // columns,)
    elif columns == 256 or arch.startswith("gfx9"):  # more would spill, or be slower
        sizes = (64,)
    # Least work for the busiest multiprocessor; of equals the larger tile, which decodes each weight less often.
    tokens = min(sizes, key=lambda size: (_rounds(arch, problem, tiles, size) * size, -size))
    tokens = min(tokens, max(16, 1 << (problem.tokens - 1).bit_length()))
    return GemmConfig(tiles, tokens, columns, 1, 4, 2)


def _programs(problem: Problem, tiles: int, tokens: int) -> int:
    return -(-problem.rows // (ROW_TILE * tiles)) * -(-problem.tokens // tokens)


def _rounds(arch: str, problem: Problem, tiles: int, tokens: int) -> int:
    """Programs of the busiest multiprocessor."""
    return -(-_programs(problem, tiles, tokens) // units_of(arch))


def _split(arch: str, problem: Problem, tiles: int, tokens: int, columns: int) -> int:
    """Programs per tile: a divisor of the number of chunks that fills the GPU, with four chunks each at least.

    With few tokens every program only waits for memory, so more of them help until all multiprocessors have one; with
    many, splitting a full GPU's tiles would add a second kernel and save nothing.
    """
    programs = _programs(problem, tiles, tokens)
    chunks = problem.columns // columns
    split = 1
    wanted = units_of(arch) if problem.tokens <= 64 else units_of(arch) // 2
    while programs * split < wanted and split < 16 and chunks % (2 * split) == 0 and chunks >= 8 * split:
        split *= 2
    return split
