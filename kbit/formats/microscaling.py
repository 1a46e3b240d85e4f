"""OCP's small floats (Microscaling Formats v1.0) as files hold them: E2M1 codes, and E8M0 scales."""

from __future__ import annotations

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
