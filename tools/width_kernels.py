"""A kernel for each nested width, or one that is told the width: what their machine code is like, without a GPU.

    python tools/width_kernels.py                          the table of docs/gpu.md
    python tools/width_kernels.py --target sm_90           for one target (may be repeated)

Compiles the product of one token with 4096 x 4096 weights: for each width as kbit runs it ("own"); and twice for all
widths together, with the width as an argument. "masked" decodes 8 bits, and loads no words of planes above the width;
"loop" goes through the planes one by one. Thread instructions a weight, registers, spills. Neither of the two is part
of kbit.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from multiprocessing import get_context

os.environ.pop("TRITON_INTERPRET", None)

import triton
import triton.language as tl
from triton_lint.cases_matmul import gemv_case
from triton_lint.chips import TARGETS
from triton_lint.driver import compile_for
from triton_lint.report import report

from kbit.kernels.triton.codecs.codes import load_plane
from kbit.kernels.triton.codecs.nested import bytes_of, halved_words, interleaved, two_bits
from kbit.kernels.triton.product import gemv

TABLE = ("sm_80", "sm_90", "sm_100", "gfx942")
WIDTHS = range(2, 9)
PLANE = tl.constexpr(4096 * 4096 // 32)  # words of a plane of one bit
WEIGHTS = 128  # of a lane in a turn: 16 rows of 256 columns among 32


@triton.jit
def looked_up(words, values, STEPS: tl.constexpr):
    found = bytes_of(words)
    W: tl.constexpr = found.shape[0]
    codes = tl.permute(found, (0, 1, 2, 4, 6, 5, 3))
    return tl.reshape(tl.gather(values, tl.reshape(codes, (W * STEPS * 256,)), 0), (W, 32, STEPS, 2, 2, 2))


@triton.jit
def plane_if(plane, first, there, COLUMNS: tl.constexpr):
    tl.static_assert(COLUMNS == 256)
    at = plane + (first[:, None, None] + tl.arange(0, 32)[None, :, None] * 4 + tl.arange(0, 4)[None, None, :])
    return tl.load(at, mask=there, other=0, eviction_policy="evict_first")


@triton.jit
def masked(
    planes, tile, chunk, padded_columns, values, width, BITS: tl.constexpr, KIND: tl.constexpr, COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """`values.load_values` at any width: the number comes where plain codecs have a constant."""
    first = tile * (padded_columns // 2) + chunk * (COLUMNS // 2)
    low = load_plane(planes[0], first * 2, 2, COLUMNS)
    third, fourth = plane_if(planes[1], first, width > 2, COLUMNS), plane_if(planes[2], first, width > 3, COLUMNS)
    fifth, sixth = plane_if(planes[3], first, width > 4, COLUMNS), plane_if(planes[4], first, width > 5, COLUMNS)
    seventh, eighth = plane_if(planes[5], first, width > 6, COLUMNS), plane_if(planes[6], first, width > 7, COLUMNS)
    nibbles = interleaved(low, two_bits(third, fourth), 2, 0x33333333, -0x33333334)
    high = interleaved(two_bits(fifth, sixth), two_bits(seventh, eighth), 2, 0x33333333, -0x33333334)
    return looked_up(interleaved(nibbles, high, 4, 0x0F0F0F0F, -0x0F0F0F10), values, COLUMNS // 16)


@triton.jit
def looped(
    planes, tile, chunk, padded_columns, values, width, BITS: tl.constexpr, KIND: tl.constexpr, COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """The same with a loop over planes that lie one behind another."""
    first = tile * (padded_columns // 2) + chunk * (COLUMNS // 2)
    low = load_plane(planes[0], first * 2, 2, COLUMNS)
    words = halved_words(tl.join(low & 0x33333333, (low >> 2) & 0x33333333))  # a byte for each code
    for bit in range(2, width):
        plane = load_plane(planes[1] + (bit - 2) * PLANE, first, 1, COLUMNS)
        both = tl.reshape(tl.join(plane, plane >> 1), (plane.shape[0], 32, 2 * plane.shape[2]))
        both = tl.join(both, both >> 2)
        words |= (tl.join(both, both >> 4) & 0x01010101) << bit
    return looked_up(words, values, COLUMNS // 16)


Numbers = tuple[float, int, int, float]


def compiled(text: str, arch: str) -> Numbers:
    """Instructions a weight, registers, spills, and instructions a weight of a loop inside of the loop over columns."""
    case = gemv_case(text)
    with compile_for(arch) as launches:
        case.launch(arch, None)
    found = report(launches[0], case.work(launches[0], None))
    assert found.estimate is not None
    body = found.hot
    inner = [loop for loop in found.code.loops() if body and body[0].address < loop[0].address < body[-1].address]
    return found.estimate.per_unit, found.registers, found.spills, len(inner[0]) / WEIGHTS if inner else 0.0


def all_compiled(how: str, targets: Sequence[str]) -> dict[tuple[str, int], Numbers]:
    """By target and width. To be called once in a process: Triton takes a kernel for the same as long as that lives."""
    if how == "own":
        return {(arch, width): compiled(f"nested2..{width}-b64", arch) for arch in targets for width in WIDTHS}
    # The argument that plain codecs have a constant in is the width. 7 is like most numbers: not 1, not a multiple of
    # 16; so what is compiled serves all.
    gemv.load_values, gemv.magic_number = (masked if how == "masked" else looped), lambda weight: 7
    found = {arch: compiled("nested2..8-b64", arch) for arch in targets}
    return {(arch, width): found[arch] for arch in targets for width in WIDTHS}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--target", action="append", choices=TARGETS, help="only this target (may be repeated)")
    targets = parser.parse_args().target or TABLE
    kinds = ("own", "masked", "loop")
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        found = pool.starmap(all_compiled, [(how, targets) for how in kinds], chunksize=1)
    print("thread instructions a weight, registers, spills")
    print(f"{'':8} {'width':>5}  {'own':>14}  {'masked':>14}  {'loop':>14}")
    for arch in targets:
        for width in WIDTHS:
            cells = []
            for each, registers, spills, inner in (numbers[arch, width] for numbers in found):
                each += (width - 3) * inner  # the lint counts an inner loop once
                cells.append(f"{each:5.2f} {registers:4} {spills:3}")
            if arch.startswith("gfx"):  # unrolled, and the inner loop is all that the lint finds
                cells.pop()
            print(f"{arch:8} {width:5}  {'  '.join(cells)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
