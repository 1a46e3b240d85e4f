"""The planes codec without torch: what the native kernels must know, and filling a matrix from codes that exist."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kbit.formats.quant_format import SUPERBLOCK, QuantFormat, plane_widths
from kbit.formats.stored import NUMPY_DTYPES, StoredMatrix

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class StoredPlanes(StoredMatrix):
    """A stored matrix in a format of the planes codec."""

    format: QuantFormat

    @classmethod
    def of(cls, matrix: StoredMatrix) -> StoredPlanes:
        """The same arrays, read as planes.

        Raises:
            TypeError: another codec stored them.
        """
        if not isinstance(matrix.format, QuantFormat):
            raise TypeError(f"{matrix.format} is a format of the {matrix.format.family} codec, not of planes")
        return cls(matrix.format, matrix.shape, matrix.parts, matrix.codebook)

    @property
    def planes(self) -> list[NDArray[np.uint8]]:
        """Bit planes (N, ceil(K * width / 8)), widest first."""
        return [self.parts[f"plane{width}"] for width in plane_widths(self.format.bits)]

    def codes(self) -> NDArray[np.uint8]:
        """All codes (N, K)."""
        from kbit.formats.plane_codes import unpack_plane

        codes, shift = np.empty(self.shape, dtype=np.uint8), 0
        for width, plane in zip(plane_widths(self.format.bits), self.planes, strict=True):
            unpack_plane(np.ascontiguousarray(plane), width, shift, shift == 0, codes)
            shift += width
        return codes

    def kernel_scales(self, name: str) -> tuple[NDArray[Any] | None, str]:
        """ "scales" or "offsets" as kernels read them, and their number type: (N, blocks), or None.

        Double-quantized ones are multiplied out, in float32, as `kbit.formats.scales.load_scales` does.
        """
        values = self.parts.get(name)
        if values is None or not self.format.double_quant:
            return values, self.format.scale_dtype
        position = np.arange(values.size).reshape(values.shape) // SUPERBLOCK
        return values.astype(np.float32) * self.parts[f"{name}_super"][position], "fp32"


class RowsPacker:
    """Fills a matrix of a planes format from codes and block values that exist already, some rows at a time.

    Args:
        format: without double-quantized scales.
        shape: (N, K).
    """

    def __init__(self, format: QuantFormat, shape: tuple[int, int]) -> None:
        self._format, self._shape = format, shape
        self._parts: dict[str, NDArray[Any]] = {
            suffix: np.empty(part.shape, dtype=NUMPY_DTYPES[part.dtype])
            for suffix, part in format.parts(*shape).items()
        }

    def put(
        self,
        start: int,
        codes: NDArray[np.uint8],
        scales: NDArray[Any],
        offsets: NDArray[Any] | None,
    ) -> None:
        """Rows from `start` on: codes (R, K); scales and offsets (R, blocks) of the format's type, bf16 as patterns."""
        rows = slice(start, start + len(codes))
        for width, plane in zip(plane_widths(self._format.bits), pack_codes(codes, self._format.bits), strict=True):
            self._parts[f"plane{width}"][rows] = plane
        for suffix, values in (("scales", scales), ("offsets", offsets)):
            if values is not None:
                self._parts[suffix][rows] = values.view(np.uint16) if values.dtype == np.float16 else values

    def matrix(self, codebook: NDArray[np.float32]) -> StoredMatrix:
        """The result, once every row is there; codebook (2^k,)."""
        return StoredMatrix(self._format, self._shape, self._parts, codebook)


def pack_codes(codes: NDArray[np.uint8], bits: int) -> list[NDArray[np.uint8]]:
    """Codes (N, K), each below 2^bits, as bit planes (N, ceil(K * width / 8)), widest first; see formats.planes."""
    from kbit.formats.plane_codes import pack_plane

    planes, shift = [], 0
    for width in plane_widths(bits):
        plane = np.empty((codes.shape[0], -(-codes.shape[1] * width // 8)), dtype=np.uint8)
        pack_plane(codes, width, shift, plane)
        planes.append(plane)
        shift += width
    return planes
