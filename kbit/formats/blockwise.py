"""Blockwise quantization: round every weight to the nearest codebook entry times its block's scale.

This is plain round-to-nearest (RTN), the meaning of "quantize x to this format" that every better quantizer starts
from. It runs in two passes over chunks of rows, scales first and codes second, so a matrix of any size needs memory
for its result plus one chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd

import numpy as np
import torch

from kbit.formats.codebooks import codebook as format_codebook
from kbit.formats.codebooks import quantile_codebook
from kbit.formats.planes import pack
from kbit.formats.planes_codec import PlanesTensor, spread
from kbit.formats.quant_format import QuantFormat, plane_widths
from kbit.formats.quant_tensor import QuantTensor
from kbit.formats.scales import load_scales, store_scales
from kbit.host.errors import KbitError

# Weights worked on at once. The scratch of a chunk is about 16 bytes a weight (values, normalised values, 32-bit
# codes, masks): 64 MB here. Larger chunks are no faster.
CHUNK_WEIGHTS = 1 << 22

# Values sampled, evenly spaced, to estimate a quantile codebook. With 2^20 values the standard error of the outermost
# 8-bit quantile's probability (1/510) is 4e-5, 2 % of it.
QUANTILE_SAMPLE = 1 << 20


def quantize_blockwise(x: torch.Tensor, format: QuantFormat, *, like: QuantTensor | None = None) -> PlanesTensor:
    """Quantize a matrix by rounding to nearest.

    Args:
        x: (N, K), any float dtype.
        format: the target format.
        like: take codebook and scales from this tensor of the same shape and format instead of computing them:
            the projection onto a fixed grid, which is idempotent for every format.

    Raises:
        KbitError: x is empty, holds NaN or infinity, or a scale does not fit its stored type.
    """
    x = x.detach()
    rows, columns = x.shape
    return quantize_rows(lambda start, stop: x[start:stop].float().contiguous(), (rows, columns), format, like=like)


def quantize_rows(
    read_rows: Callable[[int, int], torch.Tensor],
    shape: tuple[int, int],
    format: QuantFormat,
    *,
    like: QuantTensor | None = None,
    name: str = "tensor",
) -> PlanesTensor:
    """quantize_blockwise for a matrix that is read in pieces.

    Args:
        read_rows: (start, stop) -> float32 (stop - start, K); called twice for every row of a matrix that is larger
            than one chunk.
        shape: (N, K).
        format: the target format.
        like: see quantize_blockwise.
        name: what to call the tensor in errors.

    Raises:
        KbitError: see quantize_blockwise.
    """
    rows, columns = shape
    if rows < 1 or columns < 1:
        raise KbitError(f"{name} is empty, {rows} x {columns}: there is nothing to quantize")
    if like is not None and (like.format, like.shape) != (format, shape):
        raise KbitError(f"{name}: `like` is {like.format} {like.shape}, not {format} {shape}")
    step = max(1, CHUNK_WEIGHTS // columns)
    chunks = [(start, min(start + step, rows)) for start in range(0, rows, step)]
    if len(chunks) == 1:
        whole = read_rows(0, rows)

        def read_rows(start: int, stop: int) -> torch.Tensor:
            return whole

    if like is None:
        parts, levels = _fit(read_rows, chunks, shape, format, name)
    else:
        parts, levels = {key: v for key, v in like.stored.items() if not key.startswith("plane")}, like.codebook
    scales, offsets = load_scales(parts, "scales", format), load_scales(parts, "offsets", format)
    assert scales is not None
    encoder = Encoder.for_codebook(levels)
    planes: dict[str, torch.Tensor] = {
        f"plane{width}": torch.empty(format.parts(rows, columns)[f"plane{width}"].shape, dtype=torch.uint8)
        for width in plane_widths(format.bits)
    }
    for start, stop in chunks:
        x = check_finite(read_rows(start, stop), start, stop, name)
        codes = encoder.encode(
            normalise(x, scales[start:stop], None if offsets is None else offsets[start:stop], format)
        )
        for plane, packed in zip(planes.values(), pack(codes, format.bits), strict=True):
            plane[start:stop] = packed
    stored = {**planes, **parts}
    ordered = {suffix: stored[suffix] for suffix in format.parts(rows, columns)}
    return PlanesTensor(format, shape, ordered, levels)


def _fit(
    read_rows: Callable[[int, int], torch.Tensor],
    chunks: list[tuple[int, int]],
    shape: tuple[int, int],
    format: QuantFormat,
    name: str,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """First pass: scales (and offsets) as stored, and the codebook."""
    rows, columns = shape
    all_scales, all_offsets, samples = [], [], []
    stride = _sample_stride(rows, columns)
    for start, stop in chunks:
        x = check_finite(read_rows(start, stop), start, stop, name)
        scales, offsets = block_statistics(x, format)
        all_scales.append(scales)
        if offsets is not None:
            all_offsets.append(offsets)
        if format.has_own_codebook:
            first = -(start * columns) % stride  # one even grid of samples over the whole matrix
            samples.append(x.reshape(-1)[first::stride].clone())
    try:
        parts = store_scales(torch.cat(all_scales), torch.cat(all_offsets) if all_offsets else None, format)
    except KbitError as error:
        raise KbitError(f"{name}: {error}") from None
    if format.has_own_codebook:
        levels = torch.from_numpy(quantile_codebook(np.sort(torch.cat(samples).numpy()), format.bits))
        parts["codebook"] = levels
    else:
        levels = torch.from_numpy(format_codebook(format, columns).copy())
    return parts, levels


def matrix_codebook(weight: torch.Tensor, format: QuantFormat) -> torch.Tensor:
    """The codebook of a matrix (N, K) in a format, float32 (2^k,); from its values where the format says so."""
    if not format.has_own_codebook:
        return torch.from_numpy(format_codebook(format, weight.shape[1]).copy())
    stride = _sample_stride(*weight.shape)
    return torch.from_numpy(quantile_codebook(np.sort(weight.reshape(-1)[::stride].numpy()), format.bits))


def _sample_stride(rows: int, columns: int) -> int:
    """Which of the values are looked at: a stride that shares a factor with the row would leave out most columns."""
    stride = max(1, rows * columns // QUANTILE_SAMPLE)
    while gcd(stride, columns) != 1:
        stride += 1
    return stride


def check_finite(x: torch.Tensor, start: int, stop: int, name: str) -> torch.Tensor:
    """Rows [start, stop) of a matrix, as they are.

    Raises:
        KbitError: they hold NaN or infinity.
    """
    # A sum is not finite if one term is not: four times cheaper than looking at each. It may also overflow, so count.
    if not bool(torch.isfinite(x.sum())) and (bad := int((~torch.isfinite(x)).sum())):
        raise KbitError(f"{name}: {bad} weights are NaN or infinite in rows {start} to {stop - 1}: mend the source")
    return x


def block_statistics(x: torch.Tensor, format: QuantFormat) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale (and offset) of every block before rounding.

    Symmetric formats: scale = max|x|. With offset: offset = (max + min) / 2, scale = (max - min) / 2.

    Args:
        x: float32 (N, K).

    Returns:
        float32 (N, blocks), twice or with None.
    """
    blocks = _blocked(x, format)
    if not format.asymmetric:
        return blocks.abs().amax(dim=2), None
    low, high = blocks.amin(dim=2), blocks.amax(dim=2)
    return high / 2 - low / 2, high / 2 + low / 2  # halved first: high - low may overflow


def normalise(x: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor | None, format: QuantFormat) -> torch.Tensor:
    """(x - offset) / scale, float32 (N, K). A zero scale gives zero.

    Multiplies by the reciprocal, as bitsandbytes does: dividing rounds differently, and the codes would not match.
    """
    columns = x.shape[1]
    if offsets is not None:
        x = x - spread(offsets, format, columns)
    # 1e-38 is bitsandbytes' floor: the reciprocal stays finite. A zero scale can belong to a block that is not zero:
    # its true scale was rounded away, or the offset was rounded. Such weights decode to zero (or the offset) whatever
    # their code, so their code must not depend on them: else quantizing twice would give other codes than once.
    reciprocals = torch.where(scales > 0, 1.0 / scales.clamp(min=1e-38), 0.0)
    return x * spread(reciprocals, format, columns)


def _blocked(x: torch.Tensor, format: QuantFormat) -> torch.Tensor:
    """x as (N, blocks, block); a short last block is filled up with the row's last value."""
    rows, columns = x.shape
    if format.block_size == 0 or columns <= format.block_size:
        return x.view(rows, 1, columns)
    missing = -columns % format.block_size
    if missing:
        x = torch.cat([x, x[:, -1:].expand(rows, missing)], dim=1)
    return x.view(rows, -1, format.block_size)


# Cells of the table that finds a value's place among the borders. 8-bit codebooks need 256 to 1024 of them.
_MOST_CELLS = 4096
# Values looked up at a time: their scratch stays in a core's cache.
_PIECE = 1 << 16


def used_levels(codebook: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The levels that weights are rounded to, ascending, float32, and the code of each, uint8.

    Of equal levels (+0 and -0) the lowest code is used; levels below -1 never are.
    """
    values, first = np.unique(codebook.numpy(), return_index=True)
    used = values >= -1.0
    return torch.from_numpy(values[used]), torch.from_numpy(first[used].astype(np.uint8))


@dataclass(frozen=True)
class Encoder:
    """Nearest-entry search in a codebook.

    Attributes:
        borders: midpoints between neighbouring levels, float32, ascending. A value on a border goes to the lower one.
        codes: the code of each level, uint8, in ascending order of level.
        cells: a table that finds the place at once, or None where two borders are too close for it.
    """

    borders: torch.Tensor
    codes: torch.Tensor
    cells: _Cells | None = None

    @classmethod
    def for_codebook(cls, codebook: torch.Tensor) -> Encoder:
        """Prepare a codebook."""
        levels, codes = used_levels(codebook)
        borders = (levels[1:] + levels[:-1]) / 2
        return cls(borders, codes, _Cells.of(borders, codes))

    def encode(self, normalised: torch.Tensor) -> torch.Tensor:
        """Codes uint8 (N, K) of normalised values float32 (N, K)."""
        if self.cells is None:
            index = torch.bucketize(normalised, self.borders, out_int32=True)
            return self.codes[index]
        codes = torch.empty(normalised.shape, dtype=torch.uint8)
        values, out = normalised.reshape(-1), codes.view(-1)
        for start in range(0, len(values), _PIECE):
            out[start : start + _PIECE] = self.cells.encode(values[start : start + _PIECE])
        return codes


@dataclass(frozen=True)
class _Cells:
    """The place of a value among borders without a search: [-1, 1] is cut into cells with at most one border in each.

    A binary search mispredicts a branch for every bit of the code, 17 ns (4 bits) to 45 ns (8 bits) a value; this takes
    6 to 8. It is exact however the arithmetic rounds: the cell of a value never falls as the value rises, so borders
    in lower cells lie below it, borders in higher cells above, and the one in its own cell is compared with it.

    Attributes:
        border: float32 (C,): the border in each cell; infinite where there is none.
        below, above: uint8 (C,): the code of values up to that border, and beyond it.
    """

    border: torch.Tensor
    below: torch.Tensor
    above: torch.Tensor

    @classmethod
    def of(cls, borders: torch.Tensor, codes: torch.Tensor) -> _Cells | None:
        if not len(borders):
            return None
        cells = 64
        while len(torch.unique(where := _cell(borders, cells))) < len(borders):
            cells *= 2
            if cells > _MOST_CELLS:
                return None
        border = torch.full((cells,), torch.inf)
        border[where.long()] = borders
        lower = torch.searchsorted(where.long(), torch.arange(cells))  # borders in lower cells
        return cls(border, codes[lower], codes[(lower + 1).clamp(max=len(borders))])

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """Codes uint8 (P,) of values float32 (P,)."""
        cell = _cell(values, len(self.border))
        beyond = values > self.border.index_select(0, cell)
        return torch.where(beyond, self.above.index_select(0, cell), self.below.index_select(0, cell))


def _cell(values: torch.Tensor, cells: int) -> torch.Tensor:
    """The cell of each value, int32; what lies outside [-1, 1] belongs to the cell at that end."""
    return values.mul(cells / 2).add_(cells / 2).clamp_(0, cells - 1).to(torch.int32)
