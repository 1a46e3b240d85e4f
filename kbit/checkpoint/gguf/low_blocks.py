"""GGUF's types below 4 bits, and NVFP4, as codes and scales of kbit's: what `blocks` lists of them.

IQ1 to IQ3 choose eight or four weights at a time from a grid, with signs; yet a weight is one of 6 or 16 numbers times
the scale of its 16 or 32 (dequantize_row_iq* of ggml-quants.c). So 3 or 4 bits and a scale hold them exactly, at more
bits than the file has. Which of the numbers each is, the gguf package's decoder tells, which has the grids.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kbit.formats.microscaling import e4m3

Bytes = NDArray[Any]
Unpacked = tuple[Bytes, NDArray[np.floating], None]
Unpack = Callable[[Bytes], Unpacked]


def _both(*levels: int) -> tuple[int, ...]:
    return (*(-level for level in reversed(levels)), *levels)


# Numbers of the grids with both signs; IQ1's are -1, 0 and 1 plus or minus an eighth, in eighths.
IQ1, IQ2 = _both(1, 7, 9), _both(8, 25, 43)
IQ3_XXS, IQ3_S = _both(4, 12, 20, 28, 36, 44, 52, 62), _both(1, 3, 5, 7, 9, 11, 13, 15)
_FARTHEST = 64
_POWERS_OF_3 = (1, 3, 9, 27, 81)


def codebook(levels: tuple[int, ...]) -> NDArray[np.float32]:
    """Levels as a codebook of 2^k, filled up with zeros."""
    size = max(4, 1 << (len(levels) - 1).bit_length())
    return np.array([*levels, *[0] * (size - len(levels))], dtype=np.float32)


def half(blocks: Bytes, at: int) -> NDArray[np.float32]:
    """The fp16 number at a byte offset of every block, float32 (n, 1)."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


def _words(blocks: Bytes, begin: int, end: int, dtype: str) -> NDArray[Any]:
    return np.ascontiguousarray(blocks[:, begin:end]).view(dtype)


def _by_levels(name: str, levels: tuple[int, ...], scales_of: Callable[[Bytes], NDArray[np.float32]]) -> Unpack:
    """How blocks of a type are unpacked whose scales are known and whose grids the gguf package has."""
    code_of = np.zeros(2 * _FARTHEST + 1, dtype=np.uint8)
    code_of[np.array(levels) + _FARTHEST] = np.arange(len(levels))

    def unpack(blocks: Bytes) -> Unpacked:
        import gguf

        with np.errstate(all="ignore"):  # scales of a damaged file; whoever uses the values checks them
            scales = scales_of(blocks)
            values = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name])
            steps = np.rint(values / scales.repeat(values.shape[1] // scales.shape[1], axis=1))
            places = np.nan_to_num(steps, nan=0.0, posinf=0.0, neginf=0.0).clip(-_FARTHEST, _FARTHEST).astype(np.int16)
        return code_of[places + _FARTHEST], scales, None

    return unpack


def _iq2_xxs(blocks: Bytes) -> NDArray[np.float32]:
    own = _words(blocks, 2, 66, "<u4")[:, 1::2] >> np.uint32(28)
    found: NDArray[np.float32] = half(blocks, 0) * (np.float32(0.5) + own.astype(np.float32)) * np.float32(0.25)
    return found


def _iq2_halves(blocks: Bytes) -> NDArray[np.float32]:
    """IQ2_XS and IQ2_S: two scales in each of the last eight bytes."""
    own = np.stack([blocks[:, 66:74] & 15, blocks[:, 66:74] >> 4], axis=2).reshape(len(blocks), -1)
    found: NDArray[np.float32] = half(blocks, 0) * (np.float32(0.5) + own.astype(np.float32)) * np.float32(0.25)
    return found


def _iq2_s(blocks: Bytes) -> NDArray[np.float32]:
    return _iq2_halves(np.concatenate([blocks[:, :66], blocks[:, 74:82]], axis=1))


def _iq3_xxs(blocks: Bytes) -> NDArray[np.float32]:
    own = _words(blocks, 66, 98, "<u4") >> np.uint32(28)
    found: NDArray[np.float32] = half(blocks, 0) * (np.float32(0.5) + own.astype(np.float32)) * np.float32(0.5)
    return found


def _iq3_s(blocks: Bytes) -> NDArray[np.float32]:
    own = np.stack([blocks[:, 106:110] & 15, blocks[:, 106:110] >> 4], axis=2).reshape(len(blocks), -1)
    found: NDArray[np.float32] = half(blocks, 0) * (1 + 2 * own.astype(np.float32))
    return found


def _iq1_s(blocks: Bytes) -> NDArray[np.float32]:
    own = (_words(blocks, 34, 50, "<u2") >> np.uint16(12)) & np.uint16(7)
    found: NDArray[np.float32] = half(blocks, 0) * (2 * own.astype(np.float32) + 1) * np.float32(0.125)
    return found


def _iq1_m(blocks: Bytes) -> NDArray[np.float32]:
    """The fp16 scale is in the upper quarters of four words, whose other twelve bits are four scales."""
    words = _words(blocks, 48, 56, "<u2")
    whole = (words >> np.uint16(12)) << (np.arange(4, dtype=np.uint16) * np.uint16(4))
    d = np.bitwise_or.reduce(whole, axis=1, keepdims=True).astype(np.uint16).view(np.float16).astype(np.float32)
    own = (words[:, :, None] >> (np.arange(4, dtype=np.uint16) * np.uint16(3))) & np.uint16(7)
    found: NDArray[np.float32] = d * (2 * own.reshape(len(blocks), -1).astype(np.float32) + 1) * np.float32(0.125)
    return found


def tq1_0(blocks: Bytes) -> Unpacked:
    """Five ternary digits a byte, the last four bytes four; bytes are fractions of 256 whose digits come from above."""
    parts = []
    for begin, end, digits in ((0, 32, 5), (32, 48, 5), (48, 52, 4)):
        for power in _POWERS_OF_3[:digits]:
            shifted = blocks[:, begin:end] * np.uint8(power)
            parts.append((shifted.astype(np.uint16) * 3 >> 8).astype(np.uint8))
    return np.concatenate(parts, axis=1), half(blocks, 52).astype(np.float16), None


def tq2_0(blocks: Bytes) -> Unpacked:
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[None, None, :, None]
    codes = (blocks[:, :64].reshape(len(blocks), 2, 1, 32) >> shifts) & 3
    return codes.reshape(len(blocks), -1), half(blocks, 64).astype(np.float16), None


def q1_0(blocks: Bytes) -> Unpacked:
    """A sign a weight, the lowest bit first: 1 is plus."""
    codes = np.unpackbits(np.ascontiguousarray(blocks[:, 2:]), axis=1, bitorder="little")
    return codes, half(blocks, 0).astype(np.float16), None


def q2_0(blocks: Bytes) -> Unpacked:
    """Two bits a weight, the lowest first: code less 1."""
    codes = (blocks[:, 2:, None] >> np.arange(0, 8, 2, dtype=np.uint8)) & 3
    return codes.reshape(len(blocks), -1), half(blocks, 0).astype(np.float16), None


def nvfp4(blocks: Bytes) -> Unpacked:
    """Four times an E4M3 scale without sign for 16 weights; of their bytes first the low halves, then the high ones."""
    scales = e4m3()[:128]
    scales[127] = 480  # as ggml reads it where a sign is set; without one it is nothing
    own = np.where(blocks[:, :4] == 127, np.float32(0), scales[blocks[:, :4] & np.uint8(127)])
    packed = blocks[:, 4:].reshape(len(blocks), 4, 8)
    codes = np.concatenate([packed & 15, packed >> 4], axis=2).reshape(len(blocks), -1)
    return codes, own.astype(np.float32), None


# By type: format, levels of the codebook, how blocks are unpacked.
GRIDS: dict[str, tuple[str, tuple[int, ...], Unpack]] = {
    "IQ1_S": ("int3-b32-fp32", IQ1, _by_levels("IQ1_S", IQ1, _iq1_s)),
    "IQ1_M": ("int3-b16-fp32", IQ1, _by_levels("IQ1_M", IQ1, _iq1_m)),
    "IQ2_XXS": ("int3-b32-fp32", IQ2, _by_levels("IQ2_XXS", IQ2, _iq2_xxs)),
    "IQ2_XS": ("int3-b16-fp32", IQ2, _by_levels("IQ2_XS", IQ2, _iq2_halves)),
    "IQ2_S": ("int3-b16-fp32", IQ2, _by_levels("IQ2_S", IQ2, _iq2_s)),
    "IQ3_XXS": ("int4-b32-fp32", IQ3_XXS, _by_levels("IQ3_XXS", IQ3_XXS, _iq3_xxs)),
    "IQ3_S": ("int4-b32-fp32", IQ3_S, _by_levels("IQ3_S", IQ3_S, _iq3_s)),
    "TQ1_0": ("int2-b256", (-1, 0, 1), tq1_0),
    "TQ2_0": ("int2-b256", (-1, 0, 1, 2), tq2_0),
    "Q1_0": ("int2-b128", (-1, 1), q1_0),
    "Q2_0": ("int2-b64", (-1, 0, 1, 2), q2_0),
}
