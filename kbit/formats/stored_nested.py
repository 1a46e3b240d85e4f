"""The nested codec without torch: what the native kernels must know of a matrix at one of its widths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kbit.formats.nested import NestedFormat
from kbit.formats.stored import StoredMatrix, rounded, widened

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class StoredNested(StoredMatrix):
    """A stored matrix in a format of the nested codec."""

    format: NestedFormat

    @classmethod
    def of(cls, matrix: StoredMatrix) -> StoredNested:
        """The same arrays, read as nested.

        Raises:
            TypeError: another codec stored them.
        """
        if not isinstance(matrix.format, NestedFormat):
            raise TypeError(f"{matrix.format} is a format of the {matrix.format.family} codec, not nested")
        return cls(matrix.format, matrix.shape, matrix.parts, matrix.codebook)

    def planes(self, width: int) -> list[NDArray[np.uint8]]:
        """Planes of 2, 1, 1, .. bits up to a width."""
        return [self.parts[name] for name in self.format.planes_at(width)]

    def kernel_scales(self, width: int) -> NDArray[Any]:
        """Scales of a width in the format's own type, (N, blocks): what `nested_codec.scales_at` has, 16 bits as
        patterns."""
        kind = self.format.scale_dtype
        scaled = widened(self.parts["scales"], kind) * widened(self.parts[f"factor{width}"], "fp16")
        return rounded(scaled, kind)

    def levels(self, width: int) -> NDArray[np.float32]:
        """The codebook of a width, float32 (2^width,)."""
        return self.codebook[self.format.levels_at(width)]
