"""QuantTensor: a k-bit matrix in memory, in the portable layout that is also on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray

from kbit.formats.planes import unpack
from kbit.formats.quant_format import QuantFormat, plane_widths
from kbit.formats.scales import load_scales
from kbit.host.errors import CheckpointError

SAFETENSORS_TO_TORCH = {
    "U8": torch.uint8,
    "I8": torch.int8,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
}

# Dequantization works through this many weights at a time, which bounds its scratch memory to about 50 MB.
_CHUNK_WEIGHTS = 1 << 22


@dataclass(frozen=True, eq=False)
class QuantTensor:
    """A quantized matrix: codes as bit planes, a scale (and perhaps an offset) per block, a codebook.

    weight[n, k] = codebook[code[n, k]] * scale[n, k // block] (+ offset[n, k // block])

    Attributes:
        format: what the arrays mean.
        shape: (N rows, K columns); blocks run along a row.
        stored: the stored arrays by part name, as `format.parts` lists them.
        codebook: float32 (2^k,), indexed by code.
    """

    format: QuantFormat
    shape: tuple[int, int]
    stored: Mapping[str, torch.Tensor]
    codebook: torch.Tensor

    @classmethod
    def checked(
        cls,
        name: str,
        format: QuantFormat,
        shape: tuple[int, int],
        stored: Mapping[str, torch.Tensor],
        codebook: torch.Tensor,
    ) -> QuantTensor:
        """A QuantTensor from data that cannot be trusted (a file).

        Raises:
            CheckpointError: an array is missing, has the wrong type or shape, or holds NaN or infinity.
        """
        for suffix, part in format.parts(*shape).items():
            array = stored.get(suffix)
            if array is None:
                raise CheckpointError(f"{name}.{suffix} is missing: the format {format} stores it; convert again")
            if array.dtype != SAFETENSORS_TO_TORCH[part.dtype] or tuple(array.shape) != part.shape:
                raise CheckpointError(
                    f"{name}.{suffix} is {array.dtype} {tuple(array.shape)}, but {format} at {shape} stores "
                    f"{part.dtype} {part.shape}; convert again"
                )
            if array.dtype.is_floating_point and not bool(torch.isfinite(array).all()):
                raise CheckpointError(f"{name}.{suffix} holds NaN or infinity: the file is damaged; convert again")
        return cls(format, shape, dict(stored), codebook)

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

    @property
    def nbytes(self) -> int:
        """Bytes of everything stored for this tensor."""
        return sum(array.numel() * array.element_size() for array in self.stored.values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, everything counted."""
        return 8 * self.nbytes / (self.shape[0] * self.shape[1])

    @property
    def device(self) -> torch.device:
        return self.codebook.device

    def to(self, device: torch.device | str) -> QuantTensor:
        """The same tensor on another device."""
        moved = {name: array.to(device) for name, array in self.stored.items()}
        return QuantTensor(self.format, self.shape, moved, self.codebook.to(device))

    def codes(self) -> torch.Tensor:
        """All codes, uint8 (N, K)."""
        return unpack(self.planes, self.format.bits, self.shape[1])

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weights (N, K). Computed in float32, rounded once to `dtype`."""
        rows, columns = self.shape
        out = torch.empty((rows, columns), dtype=dtype, device=self.device)
        scales, offsets = self.scales, self.offsets
        step = max(1, _CHUNK_WEIGHTS // columns)
        for start in range(0, rows, step):
            chunk = slice(start, start + step)
            codes = unpack([plane[chunk] for plane in self.planes], self.format.bits, columns)
            out[chunk] = self._decode(codes, scales[chunk], None if offsets is None else offsets[chunk])
        return out

    def dequantize_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Chosen rows (an embedding lookup): rows int64 (R,) -> float32 (R, K)."""
        codes = unpack([plane[rows] for plane in self.planes], self.format.bits, self.shape[1])
        scales = load_scales(self.stored, "scales", self.format, rows)
        assert scales is not None
        return self._decode(codes, scales, load_scales(self.stored, "offsets", self.format, rows))

    def _decode(self, codes: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor | None) -> torch.Tensor:
        return decode(codes, scales, offsets, self.codebook, self.format)


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


def from_numpy(array: NDArray[Any], dtype: str) -> torch.Tensor:
    """A stored array as a tensor on the same memory; `dtype` is its safetensors name (16-bit floats come as uint16)."""
    # torch warns of memory that it must not write to (a mapped file); nobody writes to stored arrays.
    tensor = torch.from_numpy(array if array.flags.writeable else array.copy())
    wanted = SAFETENSORS_TO_TORCH[dtype]
    return tensor if tensor.dtype == wanted else tensor.view(wanted)


def spread(per_block: torch.Tensor, format: QuantFormat, columns: int) -> torch.Tensor:
    """A value per block (N, blocks) as a value per weight, broadcastable to (N, columns)."""
    if per_block.shape[1] == 1:  # one block per row: repeating it to a whole block would waste memory on short rows
        return per_block
    return per_block.repeat_interleave(format.block_size, dim=1)[:, :columns]
