"""A nested matrix on a device: planes that its widths share, and what each width has of its own.

A width is a `TritonWeight` on the first planes of all, with scales and a table of its own (16 bits a block). Planes are
padded to 16 rows and 256 columns whatever the width, so that all widths find them in the same places. How bits lie in
them: `kbit.kernels.triton.codecs.nested`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kbit.formats.nested import NestedFormat
from kbit.formats.nested_codec import scales_at
from kbit.formats.planes import unpack_plane_torch
from kbit.formats.quant_tensor import QuantTensor
from kbit.kernels.triton.codecs.layout import ROW_TILE, TritonWeight, lift_of, table_factor, tiles_first
from kbit.kernels.triton.codecs.sizes import nested_padded_shape


@dataclass(frozen=True, eq=False)
class NestedScales:
    """What a nested matrix has besides planes: enough for every width up to the widest that was read.

    Attributes:
        format: of what was read.
        shape: (N, K).
        stored: scales, and the factors of widths; where they were read, as a rule in the host's memory.
        codebook: of all widths.
    """

    format: NestedFormat
    shape: tuple[int, int]
    stored: dict[str, torch.Tensor]
    codebook: torch.Tensor

    @classmethod
    def of(cls, matrix: QuantTensor) -> NestedScales:
        assert isinstance(matrix.format, NestedFormat)
        planes = matrix.format.planes_at(matrix.format.bits)
        others = {name: array for name, array in matrix.stored.items() if name not in planes}
        return cls(matrix.format, matrix.shape, others, matrix.codebook)

    def at_width(self, width: int, planes: Sequence[torch.Tensor], dtype: torch.dtype) -> TritonWeight:
        """The matrix at a width.

        Args:
            width: one that the format serves.
            planes: of `pack_planes`, as many as the width reads, or more.
            dtype: of the activations, see `prepare_weight`.

        Raises:
            UsageError: the width is not served.
        """
        format, device = self.format.narrowed(width), planes[0].device
        padded = nested_padded_shape(*self.shape)
        scales = scales_at(format, self.stored, width)
        kind, table, multiplier = _values(self.codebook[format.levels_at(width)], width, dtype)
        stored = scales.to(self.stored["scales"].dtype)
        return TritonWeight(
            str(format),
            self.shape,
            padded,
            dtype,
            planes=tuple(planes[: width - 1]),
            scales=tiles_first(stored, format.plain(width), padded).to(device),
            kind=kind,
            table=table.to(device),
            multiplier=multiplier,
            lift=lift_of(scales),
            bits=width,
            block_size=format.block_size,
        )


def pack_planes(
    matrix: QuantTensor, device: torch.device | str, known: Sequence[torch.Tensor] = ()
) -> tuple[torch.Tensor, ...]:
    """All planes of a nested matrix as kernels read them, int32 (N' / 16, K' b / 256, 32, 4).

    Args:
        matrix: in a nested format.
        device: where they live. The work is done there.
        known: the first of them, where they are there already.
    """
    assert isinstance(matrix.format, NestedFormat)
    names = matrix.format.planes_at(matrix.format.bits)[len(known) :]
    planes = ((matrix.stored[name], 2 if name == "plane2" else 1) for name in names)
    return *known, *(_packed(plane.to(device), bits, matrix.shape) for plane, bits in planes)


def _packed(stored: torch.Tensor, bits: int, shape: tuple[int, int]) -> torch.Tensor:
    """A plane as files have it, uint8 (N, ceil(K bits / 8)), as kernels read it."""
    rows, columns = nested_padded_shape(*shape)
    out = torch.empty((rows // ROW_TILE, columns * bits // 256, 32, 4), dtype=torch.int32, device=stored.device)
    step = max(1, (1 << 22) // (ROW_TILE * columns))  # int64 scratch of 32 MB at a time
    for start in range(0, len(out), step):
        tiles = min(step, len(out) - start)
        part = stored[start * ROW_TILE : (start + tiles) * ROW_TILE]
        codes = unpack_plane_torch(part, bits, 0, shape[1])
        missing = (0, columns - shape[1], 0, tiles * ROW_TILE - len(codes))
        out[start : start + tiles] = pack_nested_plane(torch.nn.functional.pad(codes, missing), bits)
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
