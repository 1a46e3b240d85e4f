"""NestedPlanes: the planes of a nested matrix on a device, once for all of its widths (`kbit.kernels.triton.codecs.nested`).

A width is a `TritonWeight` on the first of these planes, with scales and a table of its own, 16 bits a block. A plane is
taken over when a width first needs it. The matrix is padded to 16 rows and 256 columns at every width, so that widths
lie in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from kbit.formats.nested import NestedFormat
from kbit.formats.nested_codec import scales_at
from kbit.formats.planes import unpack_plane_torch
from kbit.formats.quant_tensor import QuantTensor
from kbit.kernels.triton.codecs.layout import ROW_TILE, TritonWeight, lift_of, table_factor, tiles_first
from kbit.kernels.triton.codecs.sizes import nested_padded_shape


class NestedPlanes:
    """
    Args:
        matrix: in a nested format; only what scales and tables are made of is kept of it, where it is.
        device: where the planes live. They are rearranged there.
        dtype: of the activations, see `prepare_weight`.

    Attributes:
        planes: int32 (N' / 16, K' b / 256, 32, 4), of two bits and then of one, as far as widths were asked for. Who
            makes them views of larger ones says so by replacing them.
    """

    def __init__(self, matrix: QuantTensor, device: torch.device | str, dtype: torch.dtype) -> None:
        self.planes: list[torch.Tensor] = []
        self._device, self._dtype = torch.device(device), dtype
        self._shape = matrix.shape
        self._padded = nested_padded_shape(*matrix.shape)
        self._take(matrix)

    def at_width(self, width: int, read: Callable[[], QuantTensor] | None = None) -> TritonWeight:
        """The matrix at a width.

        Args:
            width: one that the format serves.
            read: reads it up to this width, where more is wanted than there was before.

        Raises:
            UsageError: the width is not served.
        """
        if width > self._format.bits and read is not None:
            self._take(read())
        format, (rows, columns) = self._format.narrowed(width), self._shape
        scales = scales_at(format, self._stored, width)
        levels = self._codebook[format.levels_at(width)]
        kind, table, multiplier = _values(levels, width, self._dtype)
        plain = format.plain(width)
        stored = scales.to(self._stored["scales"].dtype)
        return TritonWeight(
            str(format),
            (rows, columns),
            self._padded,
            self._dtype,
            planes=tuple(self.planes[: width - 1]),
            scales=tiles_first(stored, plain, self._padded).to(self._device),
            kind=kind,
            table=table.to(self._device),
            multiplier=multiplier,
            lift=lift_of(scales),
            bits=width,
            block_size=format.block_size,
        )

    def _take(self, matrix: QuantTensor) -> None:
        """Takes over the planes of a matrix that are not here yet."""
        assert isinstance(matrix.format, NestedFormat)
        self._format, self._codebook = matrix.format, matrix.codebook
        names = matrix.format.planes_at(matrix.format.bits)
        self._stored = {name: array for name, array in matrix.stored.items() if name not in names}
        for name in names[len(self.planes) :]:
            self.planes.append(self._packed(matrix.stored[name].to(self._device), 2 if name == "plane2" else 1))

    def _packed(self, stored: torch.Tensor, bits: int) -> torch.Tensor:
        """A plane as files have it, uint8 (N, ceil(K bits / 8)), as kernels read it."""
        (rows, columns), (padded_rows, padded_columns) = self._shape, self._padded
        out = torch.empty(
            (padded_rows // ROW_TILE, padded_columns * bits // 256, 32, 4), dtype=torch.int32, device=stored.device
        )
        step = max(1, (1 << 22) // (ROW_TILE * padded_columns))  # int64 scratch of 32 MB at a time
        for start in range(0, len(out), step):
            part = stored[start * ROW_TILE : (start + step) * ROW_TILE]
            codes = unpack_plane_torch(part, bits, 0, columns)
            tiles = min(step, len(out) - start)
            missing = tiles * ROW_TILE - len(codes)
            codes = torch.nn.functional.pad(codes, (0, padded_columns - columns, 0, missing))
            out[start : start + tiles] = pack_nested_plane(codes, bits)
        return out


def pack_nested_plane(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """The bits that a plane adds to the codes of N' x K' weights, uint8, each below 2^bits: int32 (N' / 16, K' bits /
    256, 32, 4).

    Args:
        codes: as said, N' a multiple of 16, K' of 256.
        bits: 2, or 1.
    """
    rows, columns = codes.shape
    tiles, pieces, others = rows // ROW_TILE, columns * bits // 256, 2 // bits
    # row = (tile, n8, g), column = (piece, word, o, s, k8, t, k0) -> (tile, piece, g, t | word | k8, n8, s, k0, o)
    parts = codes.view(tiles, 2, 8, pieces, 4, others, 2, 2, 4, 2).permute(0, 3, 2, 8, 4, 7, 1, 6, 9, 5)
    place = torch.arange(16 * others, device=codes.device) * bits
    words = (parts.reshape(tiles, pieces, 32, 4, -1).long() << place).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def _values(levels: torch.Tensor, width: int, dtype: torch.dtype) -> tuple[str, torch.Tensor, float]:
    """(kind, table, multiplier) of a width's codebook for activations of `dtype`."""
    levels = levels.double().cpu()
    factor = table_factor(levels, dtype)
    table = (levels * factor).to(dtype)
    if width > 3 or dtype == torch.float32:
        return "nested", table, 1 / factor
    bytes_ = torch.arange(16 if width == 2 else 128)
    first, second = bytes_ & 3, (bytes_ >> 2) & 3
    if width == 3:
        first, second = first | (bytes_ >> 2) & 4, second | (bytes_ >> 4) & 4
    pairs = torch.stack([table[first], table[second]], dim=-1)
    return "nested-pairs", pairs.contiguous().view(torch.int32).reshape(-1), 1 / factor


def join(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Tensors (T, ...) one below the other: where they lie in memory like that, a view of them, else a copy."""
    first, at = parts[0], parts[0].storage_offset()
    for part in parts:
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() and part.is_contiguous()
        if not same or part.storage_offset() != at:
            return torch.cat(list(parts))
        at += part.numel()
    return first.as_strided((sum(len(part) for part in parts), *first.shape[1:]), first.stride())
