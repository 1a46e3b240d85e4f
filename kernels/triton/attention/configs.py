"""Tile sizes of the attention kernels for each class of GPU, ranked by the offline model of tools/aot.

The model reads machine code and estimates; nothing here was timed. What decided: no spills, then the estimate at a
context of 32k tokens (decode) or 2k (prefill) with 32 query and 8 key heads of 128 features. What a user timed
(`kbit tune`) goes before it.
"""

from __future__ import annotations

from dataclasses import dataclass

from kbit.kernels.triton.product.limits import PART_FEATURES
from kbit.kernels.triton.tuned import preferred


@dataclass(frozen=True)
class DecodeConfig:
    """How attention_decode is cut.

    Attributes:
        block: tokens of a step, 16, 32 or 64.
        warps: of a program.
        stages: steps whose loads are in flight.
        programs: the number of programs to aim at when splitting the tokens: what fills the GPU once.
        p_log2: probabilities carry a factor of 2^p_log2 against underflow of probability times scale in fp16.
        scale_tiles: apply the scales of k-bit values to the decoded values (attention_core).
        one_loop: mask every step, not only the last: a third less code and fewer registers, 6 % more instructions in
            a step at 4 bits.
        waves: waves per SIMD that the AMD compiler should leave room for; 0: its own choice.
        part: features whose values a program has at most (kv_layout.program_part); 0: up to 256.
    """

    block: int = 32
    warps: int = 1
    stages: int = 1
    programs: int = 1056
    p_log2: int = 4
    scale_tiles: bool = False
    one_loop: bool = True
    waves: int = 0
    part: int = 0

    @property
    def options(self) -> dict[str, int]:
        """Launch options that only some targets know."""
        return {"waves_per_eu": self.waves} if self.waves else {}


@dataclass(frozen=True)
class PrefillConfig:
    """How attention_prefill is cut.

    Attributes:
        rows: query tokens times heads of a tile.
        block: tokens of a step.
        warps: of a program.
        stages: steps whose loads are in flight.
        scale_tiles: as in DecodeConfig, as are p_log2 (without scale_tiles), waves and part.
    """

    rows: int = 64
    block: int = 64
    warps: int = 4
    stages: int = 2
    scale_tiles: bool = True
    p_log2: int = 4
    waves: int = 0
    part: int = 0

    @property
    def options(self) -> dict[str, int]:
        """Launch options that only some targets know."""
        return {"waves_per_eu": self.waves} if self.waves else {}


# Programs of one warp that fill a GPU once: multiprocessors of the class's usual chip times the 8 such warps that
# about 250 registers a thread allow (AMD: 8 wavefronts, 2 on each SIMD). Only the number of splits follows from it.
FILL = {
    "sm_80": 864,
    "sm_86": 656,
    "sm_89": 1024,
    "sm_90": 1056,
    "sm_100": 1184,
    "sm_120": 1360,
    "gfx90a": 832,
    "gfx942": 2432,
    "gfx1100": 768,
    "gfx1201": 512,
}


def is_rdna(arch: str) -> bool:
    """gfx10, gfx11, gfx12: WMMA, and 256 registers a lane."""
    return arch.startswith(("gfx10", "gfx11", "gfx12"))


@preferred("decode")
def decode_config(arch: str, head_dim: int, k_bits: int, v_bits: int, rows: int) -> DecodeConfig:
    """The launcher's choice.

    Args:
        arch: of current_arch().
        head_dim: D.
        k_bits: width of the keys, 16 for floats.
        v_bits: width of the values.
        rows: of a tile: 16, 32 or 64.
    """
    warps = rows // 16
    codes = min(k_bits, v_bits) < 16
    nvidia = arch.startswith("sm_")
    if is_rdna(arch) or (nvidia and (head_dim > 128 or 3 in (k_bits, v_bits))):
        block = 16  # more tokens a step spill: RDNA keeps the operands of WMMA twice, 3-bit codes take two words
    else:
        block = 64 if nvidia and head_dim <= 64 and codes and rows == 16 else 32
    # Two steps in flight where a step's bytes are few, or where the registers leave no room for early loads (with one,
    # sm_80 spills four queries of 4 bits).
    few = (k_bits, v_bits) == (2, 2) or (arch == "sm_80" and head_dim > 64 and (k_bits, v_bits) == (4, 4))
    stages = 2 if nvidia and (few or (head_dim > 128 and codes)) else 1
    # 256 features hold nearly all registers; scaling the decoded values saves those of the groups' own scores, and with
    # three steps in flight keys and values of the same 2, 4 or 8 bits do not spill (else 20 to 24 spills at 4 bits).
    scale_tiles = nvidia and head_dim > 192 and codes
    stages = 3 if scale_tiles else stages
    if arch == "gfx1100" and 3 in (k_bits, v_bits):
        scale_tiles = True  # 18 spills, not 32 (8 and 11 of them in the loop of 2500 instructions)
    # gfx90a takes fp16 numbers below 2^-14 as zero in its matrix instructions; 2^10 keeps probability times scale above
    # that down to products of 6e-8, and allows scales up to 64 (values up to 1024 at 4 bits).
    p_log2 = 10 if arch == "gfx90a" else 4
    return DecodeConfig(
        block=block,
        warps=warps,
        stages=stages,
        programs=max(1, FILL.get(arch, 1056) // warps),
        p_log2=p_log2,
        scale_tiles=scale_tiles,
        # gfx1201 spills 8 registers of one loop of 3-bit codes, none of two.
        one_loop=not (arch.startswith("gfx12") and 3 in (k_bits, v_bits)),
        waves=2 if arch == "gfx1100" and codes else 0,
    )


def decode_candidates(arch: str) -> list[DecodeConfig]:
    """What tuning on a GPU should try, for tiles of 16 rows."""
    fill = FILL.get(arch, 1056)
    blocks = (16, 32) if is_rdna(arch) else (16, 32, 64)
    stages = (1, 2) if arch.startswith("sm_") else (1,)
    found = [
        DecodeConfig(block=block, stages=stage, programs=programs, one_loop=one_loop)
        for block in blocks
        for stage in stages
        for programs in (fill // 2, fill, 2 * fill)
        for one_loop in (True, False)
    ]
    # In parts nothing spills, for 1.4 to 2.2 times the instructions (docs/gpu.md): only a GPU can tell which is less.
    return [*found, *(DecodeConfig(block=16, programs=fill, part=part) for part in (64, 128))]


@preferred("prefill")
def prefill_config(arch: str, head_dim: int, k_bits: int, v_bits: int) -> PrefillConfig:
    """The launcher's choice; arguments as for decode_config."""
    codes = min(k_bits, v_bits) < 16
    if arch.startswith("sm_") and head_dim > PART_FEATURES:
        # Values of a part are 256 features wide. Of floats 8 warps hold them without spills on sm_80 and sm_90; of
        # 4-bit codes sm_90 as below, and sm_80 spills 12 registers here, the fewest of what was tried.
        if not codes:
            return PrefillConfig(rows=64, block=32, warps=8, stages=1)
        if arch not in ("sm_90", "sm_100"):
            return PrefillConfig(rows=64, block=16, warps=8, stages=1)
    if is_rdna(arch):
        # scaling decoded values spills at 4 bits on gfx1100, and takes more instructions on both
        block = 16 if codes or head_dim > 64 else 32
        return PrefillConfig(rows=64, block=block, warps=4, stages=1, scale_tiles=not codes)
    if arch.startswith("gfx"):
        return PrefillConfig(rows=64, block=32 if codes or head_dim > 128 else 64, warps=4, stages=1)
    if arch == "sm_100" and codes:
        # Triton 3.7.1 compiles the tile of 128 rows to an empty kernel here (accumulators of 16 columns in tensor
        # memory); 32 rows go through the warp-level instructions instead.
        return PrefillConfig(rows=32, block=32, warps=2, stages=1)
    if arch in ("sm_90", "sm_100"):
        if head_dim > 128:
            return PrefillConfig(rows=128, block=32, warps=8, stages=1 if codes else 2)
        return PrefillConfig(rows=128, block=64, warps=8, stages=1 if codes else 2)
    return PrefillConfig(rows=64, block=32, warps=4, stages=1 if codes else 2)


def prefill_candidates(arch: str) -> list[PrefillConfig]:
    """What tuning on a GPU should try."""
    stages = (1, 2, 3) if arch.startswith("sm_") else (1,)
    return [
        PrefillConfig(rows=rows, block=block, warps=warps, stages=stage)
        for rows, warps in ((64, 4), (128, 4), (128, 8))
        for block in ((16, 32) if is_rdna(arch) else (32, 64))
        for stage in stages
    ]
