"""QuantTensor: a k-bit matrix in memory, in the portable layout that is also on disk, whatever its codec."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from numpy.typing import NDArray

from kbit.formats.codec import Codec, Cut
from kbit.host.errors import CheckpointError

SAFETENSORS_TO_TORCH = {
    "U8": torch.uint8,
    "I8": torch.int8,
    "I32": torch.int32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
}

# Dequantization works through this many weights at a time, which bounds its scratch memory to about 50 MB.
_CHUNK_WEIGHTS = 1 << 22


@dataclass(frozen=True, eq=False)
class QuantTensor:
    """A quantized matrix: the arrays its codec stores for it.

    Attributes:
        format: the codec with its settings: what the arrays mean.
        shape: (N rows, K columns).
        stored: the stored arrays by part name, as `format.parts` lists them.
        codebook: float32 (format.codebook_size,): the values of codes; empty for a codec without.
    """

    format: Codec
    shape: tuple[int, int]
    stored: Mapping[str, torch.Tensor]
    codebook: torch.Tensor

    @classmethod
    def checked(
        cls,
        name: str,
        format: Codec,
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
        format.check_stored(name, stored, shape)
        return cls(format, shape, dict(stored), codebook)

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
        return replace(self, stored=moved, codebook=self.codebook.to(device))

    def row_indices(self, rows: slice | torch.Tensor) -> torch.Tensor:
        """Rows, a slice or indices, as indices, int64 (R,)."""
        return torch.arange(self.shape[0], device=self.device)[rows] if isinstance(rows, slice) else rows

    def dequantize(self, dtype: torch.dtype = torch.float32, width: int | None = None) -> torch.Tensor:
        """The weights (N, K). Computed in float32, rounded once to `dtype`.

        Args:
            dtype: of the result.
            width: one of the widths the format serves; None: the widest.
        """
        rows, columns = self.shape
        out = torch.empty((rows, columns), dtype=dtype, device=self.device)
        step = max(1, _CHUNK_WEIGHTS // columns)
        for start in range(0, rows, step):
            chunk = slice(start, min(start + step, rows))
            out[chunk] = self.format.decode(self, chunk, width)
        return out

    def dequantize_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Chosen rows (an embedding lookup): rows int64 (R,) -> float32 (R, K)."""
        return self.format.decode(self, rows)

    def cut(self, cut: Cut, name: str = "tensor") -> QuantTensor:
        """A part of the matrix, with the same values and its own memory.

        Raises:
            UnsupportedError: the format cannot be cut there.
        """
        self.format.check_cut(self.shape, cut, name)
        format, stored = self.format.cut(self.stored, self.shape, cut)
        rows, columns = cut.shape(self.shape)
        return QuantTensor(format, (rows, columns), {key: a.clone() for key, a in stored.items()}, self.codebook)


def join_rows(parts: Sequence[QuantTensor]) -> QuantTensor:
    """Parts of one matrix, cut along its rows, one below the other, with the same values."""
    first = parts[0]
    if len(parts) == 1:
        return first
    joinable = [part.format.joinable(part.stored, part.shape) for part in parts]
    shapes = [part.shape for part in parts]
    format, stored = joinable[0][0].join([arrays for _, arrays in joinable], shapes)
    return QuantTensor(format, (sum(rows for rows, _ in shapes), first.shape[1]), stored, first.codebook)


def from_numpy(array: NDArray[Any], dtype: str) -> torch.Tensor:
    """A stored array as a tensor on the same memory; `dtype` is its safetensors name (16-bit floats come as uint16)."""
    # torch warns of memory that it must not write to (a mapped file); nobody writes to stored arrays.
    tensor = torch.from_numpy(array if array.flags.writeable else array.copy())
    wanted = SAFETENSORS_TO_TORCH[dtype]
    return tensor if tensor.dtype == wanted else tensor.view(wanted)
