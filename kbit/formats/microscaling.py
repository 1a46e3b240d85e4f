"""OCP's small floats (Microscaling Formats v1.0) as files hold them: E2M1 and E4M3 codes, and E8M0 scales."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_HALF = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# The values of E2M1's codes, the grid's own numbers: kbit's float4e2m1 is these over 6.
E2M1 = np.array([*_HALF, *(-value for value in _HALF)], dtype=np.float32)


def e8m0(codes: NDArray[np.uint8]) -> NDArray[np.uint16]:
    """Scales of E8M0, 2^(code - 127), as patterns of bf16: exact; 255, which is NaN, becomes an infinity."""
    patterns: NDArray[np.uint16] = codes.astype(np.uint16) << np.uint16(7)
    patterns[codes == 0] = 0x40  # 2^-127 is subnormal
    return patterns


def nibbles(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Bytes (..., K / 2) as codes (..., K), the low half first."""
    codes = np.empty((*data.shape, 2), dtype=np.uint8)
    np.bitwise_and(data, 15, out=codes[..., 0])
    np.right_shift(data, 4, out=codes[..., 1])
    return codes.reshape(*data.shape[:-1], -1)


def e4m3() -> NDArray[np.float32]:
    """The values of E4M3's codes (256,), 0 for the two that are NaN: whoever reads codes refuses those."""
    codes = np.arange(128)
    exponent, fraction = codes >> 3, (codes & 7) / 8
    half = np.where(exponent == 0, fraction * 2.0**-6, (1 + fraction) * 2.0 ** (exponent - 7))
    half[127] = 0
    return np.concatenate([half, -half]).astype(np.float32)


def nearest_code(levels: NDArray[np.float32], values: NDArray[Any]) -> NDArray[np.intp]:
    """The place of the nearest of ascending levels, of two as near the even one, which is IEEE's rounding of floats."""
    borders = (levels[1:].astype(np.float64) + levels[:-1]) / 2
    places = np.searchsorted(borders, values)
    tied = np.append(borders, np.inf)[places] == values
    return np.where(tied & (places % 2 == 1), places + 1, places)
