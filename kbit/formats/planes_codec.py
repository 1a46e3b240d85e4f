"""What the planes codec's arrays mean: codes as bit planes, a scale (and perhaps an offset) per block, a codebook.

    weight[n, k] = codebook[code[n, k]] * scale[n, k // block] (+ offset[n, k // block])

`kbit.formats.quant_format` describes the arrays; this module reads them in torch, `stored_planes` in numpy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kbit.formats.planes import unpack
from kbit.formats.quant_format import QuantFormat, plane_widths
from kbit.formats.quant_tensor import QuantTensor
from kbit.formats.scales import load_scales


@dataclass(frozen=True, eq=False)
class PlanesTensor(QuantTensor):
    """A matrix in a format of the planes codec, with what kernels for it must know."""

    format: QuantFormat

    @classmethod
    def of(cls, matrix: QuantTensor) -> PlanesTensor:
        """The same arrays, read as planes.

        Raises:
            TypeError: another codec stored them.
        """
        if isinstance(matrix, PlanesTensor):
            return matrix
        if not isinstance(matrix.format, QuantFormat):
            raise TypeError(f"{matrix.format} is a format of the {matrix.format.family} codec, not of planes")
        return cls(matrix.format, matrix.shape, matrix.stored, matrix.codebook)

    @property
    def planes(self) -> tuple[torch.Tensor, ...]:
        """Bit planes (N, ceil(K * width / 8)) uint8, widest first."""
        return tuple(self.stored[f"plane{width}"] for width in plane_widths(self.format.bits))

    @property
    def scales(self) -> torch.Tensor:
        """Scales as the kernels use them: float32 (N, blocks)."""
        scales = load_scales(self.stored, "scales", self.format)
        assert scales is not None
        return scales

    @property
    def offsets(self) -> torch.Tensor | None:
        """Offsets, float32 (N, blocks), or None for a format without."""
        return load_scales(self.stored, "offsets", self.format)

    def codes(self) -> torch.Tensor:
        """All codes, uint8 (N, K)."""
        return unpack(self.planes, self.format.bits, self.shape[1])

    def decode(self, rows: slice | torch.Tensor) -> torch.Tensor:
        """Weights of some rows, float32 (R, K) (see Codec.decode)."""
        codes = unpack([plane[rows] for plane in self.planes], self.format.bits, self.shape[1])
        scales = load_scales(self.stored, "scales", self.format, rows)
        assert scales is not None
        return decode(codes, scales, load_scales(self.stored, "offsets", self.format, rows), self.codebook, self.format)


def decode(
    codes: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor | None,
    codebook: torch.Tensor,
    format: QuantFormat,
) -> torch.Tensor:
    """The meaning of a code: codebook[code] * scale (+ offset), float32 (N, K).

    Args:
        codes: uint8 (N, K).
        scales: float32 (N, blocks).
        offsets: float32 (N, blocks) or None.
        codebook: float32 (2^k,).
        format: gives the block size.
    """
    columns = codes.shape[1]
    values = codebook[codes.int()]
    values *= spread(scales, format, columns)
    if offsets is not None:
        values += spread(offsets, format, columns)
    return values


def spread(per_block: torch.Tensor, format: QuantFormat, columns: int) -> torch.Tensor:
    """A value per block (N, blocks) as a value per weight, broadcastable to (N, columns)."""
    if per_block.shape[1] == 1:  # one block per row: repeating it to a whole block would waste memory on short rows
        return per_block
    return per_block.repeat_interleave(format.block_size, dim=1)[:, :columns]
