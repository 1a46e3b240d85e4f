"""GGUF's block types as codes, scales and a codebook, so that a GGUF file runs packed as it is, without rounding again.

ggml's legacy and K types, and those of `low_blocks`, are what kbit's formats are: w = codebook[code] * scale (+ offset)
in blocks of 16 or 32. Legacy types keep their fp16 scales. K types multiply a scale of 4, 6 or 8 bits with an fp16 one
per 256 weights; the product is kept in fp32, where it is exact; the CPU engine takes the two apart again
(kernels/cpu/codecs/scale_steps.h).

Layouts: ggml-common.h (block_q4_0 and so on) and dequantize_row_* of ggml-quants.c; a test compares every type with the
gguf package's dequantization, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kbit.checkpoint.gguf import low_blocks
from kbit.checkpoint.gguf.low_blocks import GRIDS
from kbit.formats.microscaling import E2M1, e8m0
from kbit.formats.quant_format import QuantFormat
from kbit.formats.stored import widened

# uint8; not said to mypy, whose numpy stubs lose the type in every shift and mask
Bytes: TypeAlias = NDArray[Any]

# The 16 levels of IQ4_NL and IQ4_XS (kvalues_iq4nl in ggml-common.h).
_IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class Blocks:
    """Some rows, decoded.

    Attributes:
        codes: uint8 (N, K).
        scales: float16, float32 or patterns of bfloat16 (N, K / block size).
        offsets: as scales, or None.
    """

    codes: Bytes
    scales: NDArray[np.floating]
    offsets: NDArray[np.floating] | None


@dataclass(frozen=True)
class BlockType:
    """How a ggml type reads as a kbit format.

    Attributes:
        format: bits, block size, offsets and type of the scales; the codebook is the one below, not the format's own.
        codebook: float32 (2^bits,).
        unpack: blocks (n, bytes of a block) uint8 -> codes (n, weights of a block), scales and offsets (n, scales).
    """

    format: QuantFormat
    codebook: NDArray[np.float32]
    unpack: Callable[[Bytes], tuple[Bytes, NDArray[np.floating], NDArray[np.floating] | None]]

    def decode(self, data: bytes, rows: int, block_bytes: int) -> Blocks:
        """Stored bytes of `rows` whole rows."""
        blocks = np.frombuffer(data, dtype=np.uint8).reshape(-1, block_bytes)
        codes, scales, offsets = self.unpack(blocks)
        return Blocks(
            codes.reshape(rows, -1), scales.reshape(rows, -1), None if offsets is None else offsets.reshape(rows, -1)
        )

    def values(self, blocks: Blocks) -> NDArray[np.float32]:
        """What blocks stand for, float32 (N, K)."""
        found = self.codebook[blocks.codes]
        parts = [blocks.scales] if blocks.offsets is None else [blocks.scales, blocks.offsets]
        wide = [_wide(each).repeat(found.shape[1] // each.shape[1], axis=1) for each in parts]
        found *= wide[0]
        if blocks.offsets is not None:
            found += wide[1]
        return found


def _wide(values: NDArray[np.floating]) -> NDArray[np.float32]:
    """Scales as float32; those in uint16 are patterns of bfloat16."""
    return widened(values, "bf16") if values.dtype == np.uint16 else values.astype(np.float32)


def _half(blocks: Bytes, at: int) -> NDArray[np.float16]:
    """The fp16 number at a byte offset of every block: (n, 1)."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16)


def _nibbles(packed: Bytes) -> Bytes:
    """(n, b) -> (n, 2 b): all low halves, then all high halves, as the 32-weight types keep them."""
    return np.concatenate([packed & 15, packed >> 4], axis=1)


def _fifth_bits(blocks: Bytes, at: int) -> Bytes:
    """32 bits at a byte offset as 0 or 16: (n, 32)."""
    bits: Bytes = np.unpackbits(np.ascontiguousarray(blocks[:, at : at + 4]), axis=1, bitorder="little")
    return bits << 4


def _q4_0(blocks: Bytes) -> tuple[Bytes, NDArray[np.floating], None]:
    return _nibbles(blocks[:, 2:]), _half(blocks, 0), None


def _q4_1(blocks: Bytes) -> tuple[Bytes, NDArray[np.floating], NDArray[np.floating]]:
    return _nibbles(blocks[:, 4:]), _half(blocks, 0), _half(blocks, 2)


def _q5_0(blocks: Bytes) -> tuple[Bytes, NDArray[np.floating], None]:
    return _nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2), _half(blocks, 0), None


def _q5_1(blocks: Bytes) -> tuple[Bytes, NDArray[np.floating], NDArray[np.floating]]:
    return _nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4), _half(blocks, 0), _half(blocks, 2)


def _q8_0(blocks: Bytes) -> tuple[Bytes, NDArray[np.floating], None]:
    return blocks[:, 2:] ^ 128, _half(blocks, 0), None


def _fields(packed: Bytes, bits: int, run: int) -> Bytes:
    """Bytes of 8/bits fields, (n, b), as (n, b * 8/bits): a run of `run` bytes gives its fields one after another."""
    n = packed.shape[0]
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[None, None, :, None]
    fields = (packed.reshape(n, -1, 1, run) >> shifts) & ((1 << bits) - 1)
    return np.ascontiguousarray(fields).reshape(n, -1)


def _q2_k(blocks: Bytes) -> tuple[Bytes, NDArray[np.floating], NDArray[np.floating]]:
    both, packed = blocks[:, :16], blocks[:, 16:80]
    scales = _half(blocks, 80).astype(np.float32) * (both & 15)
    offsets = -(_half(blocks, 82).astype(np.float32) * (both >> 4))
    return _fields(packed, 2, 32), scales, offsets


def _q3_k(blocks: Bytes) -> tuple[Bytes, NDArray[np.floating], None]:
    high, low, packed = blocks[:, :32], blocks[:, 32:96], blocks[:, 96:108]
    codes = _fields(low, 2, 32) | (_fields(high, 1, 32) << 2)
    # 16 scales of 6 bits: 4 low bits in bytes 0..7 (first eight scales, then the others), 2 high bits in bytes 8..11.
    lows = np.concatenate([packed[:, :8] & 15, packed[:, :8] >> 4], axis=1)
    highs = _fields(packed[:, 8:], 2, 4)
    steps = (lows | (highs << 4)).astype(np.int8) - 32
    return codes, _half(blocks, 108).astype(np.float32) * steps, None


def _six_bit_pairs(packed: Bytes) -> tuple[Bytes, Bytes]:
    """The 12 bytes of eight 6-bit scales and mins of Q4_K and Q5_K: (n, 8) each."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([first & 63, (third & 15) | ((first >> 2) & 48)], axis=1)
    mins = np.concatenate([second & 63, (third >> 4) | ((second >> 2) & 48)], axis=1)
    return scales, mins


def _q4_k(blocks: Bytes) -> tuple[Bytes, NDArray[np.floating], NDArray[np.floating]]:
    scales, mins = _six_bit_pairs(blocks[:, 4:16])
    d, least = _half(blocks, 0).astype(np.float32), _half(blocks, 2).astype(np.float32)
    return _fields(blocks[:, 16:], 4, 32), d * scales, -(least * mins)


def _q5_k(blocks: Bytes) -> tuple[Bytes, NDArray[np.floating], NDArray[np.floating]]:
    scales, mins = _six_bit_pairs(blocks[:, 4:16])
    d, least = _half(blocks, 0).astype(np.float32), _half(blocks, 2).astype(np.float32)
    codes = _fields(blocks[:, 48:], 4, 32) | (_fields(blocks[:, 16:48], 1, 32) << 4)
    return codes, d * scales, -(least * mins)


def _q6_k(blocks: Bytes) -> tuple[Bytes, NDArray[np.floating], None]:
    low, high = blocks[:, :128], blocks[:, 128:192]
    codes = _fields(low, 4, 64) | (_fields(high, 2, 32) << 4)
    steps = blocks[:, 192:208].view(np.int8)
    return codes, _half(blocks, 208).astype(np.float32) * steps, None


def _iq4_xs(blocks: Bytes) -> tuple[Bytes, NDArray[np.floating], None]:
    # Eight scales of 6 bits: 2 high bits each in bytes 2 and 3, 4 low bits each in bytes 4 to 7.
    highs, lows = _fields(blocks[:, 2:4], 2, 1), _fields(blocks[:, 4:8], 4, 1)
    steps = (lows | (highs << 4)).astype(np.int8) - 32
    return _fields(blocks[:, 8:], 4, 16), _half(blocks, 0).astype(np.float32) * steps, None


def _mxfp4(blocks: Bytes) -> tuple[Bytes, Bytes, None]:
    """Scales as bfloat16 patterns: 2^(e - 127), for the numbers of the OCP grid."""
    return _nibbles(blocks[:, 1:]), e8m0(blocks[:, :1]), None


def _steps(bits: int, zero: int) -> NDArray[np.float32]:
    return np.arange(-zero, 2**bits - zero, dtype=np.float32)


def _type(
    format: str, codebook: NDArray[np.float32], unpack: Callable[[Bytes], tuple[Bytes, NDArray[np.floating], object]]
) -> BlockType:
    return BlockType(QuantFormat.parse(format), codebook, unpack)  # type: ignore[arg-type]


BLOCK_TYPES = {
    "Q4_0": _type("int4-b32", _steps(4, 8), _q4_0),
    "Q4_1": _type("int4-b32-asym", _steps(4, 0), _q4_1),
    "Q5_0": _type("int5-b32", _steps(5, 16), _q5_0),
    "Q5_1": _type("int5-b32-asym", _steps(5, 0), _q5_1),
    "Q8_0": _type("int8-b32", _steps(8, 128), _q8_0),
    "IQ4_NL": _type("int4-b32", np.array(_IQ4_NL, dtype=np.float32), _q4_0),
    "IQ4_XS": _type("int4-b32-fp32", np.array(_IQ4_NL, dtype=np.float32), _iq4_xs),
    "Q2_K": _type("int2-b16-asym-fp32", _steps(2, 0), _q2_k),
    "Q3_K": _type("int3-b16-fp32", _steps(3, 4), _q3_k),
    "Q4_K": _type("int4-b32-asym-fp32", _steps(4, 0), _q4_k),
    "Q5_K": _type("int5-b32-asym-fp32", _steps(5, 0), _q5_k),
    "Q6_K": _type("int6-b16-fp32", _steps(6, 32), _q6_k),
    "MXFP4": _type("float4e2m1-b32-bf16", E2M1, _mxfp4),
    "NVFP4": _type("float4e2m1-b16-fp32", E2M1, low_blocks.nvfp4),
    **{name: _type(form, low_blocks.codebook(levels), unpack) for name, (form, levels, unpack) in GRIDS.items()},
}
