"""What the nested codec's arrays mean, in torch (`kbit.formats.nested` describes them), and filling them.

Codes and scales of a width are those of an ordinary matrix of planes, so decoding and rounding are shared with that
codec; what is added is which bits of a code a width reads, and its factor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from kbit.formats.blockwise import CHUNK_WEIGHTS, Encoder, block_statistics, check_finite, normalise
from kbit.formats.plane_codes import pack_plane, unpack_plane
from kbit.formats.planes import pack_plane_torch, unpack_plane_torch
from kbit.formats.planes_codec import decode, spread
from kbit.formats.quant_tensor import SAFETENSORS_TO_TORCH, QuantTensor
from kbit.formats.scales import TORCH_SCALE_DTYPE, store_scales
from kbit.host.errors import KbitError

if TYPE_CHECKING:
    from kbit.formats.codec import ReadRows
    from kbit.formats.nested import NestedFormat

_LARGEST_FACTOR = 60000.0  # fp16's is 65504


def codes_at(format: NestedFormat, stored: Mapping[str, torch.Tensor], columns: int, width: int) -> torch.Tensor:
    """Codes of a width, uint8 (R, columns), of arrays that hold R rows."""
    planes = [stored[name] for name in format.planes_at(width)]
    codes = torch.empty((len(planes[0]), columns), dtype=torch.uint8, device=planes[0].device)
    shift = 0
    for plane in planes:
        bits = 1 if shift else 2
        if codes.device.type == "cpu":
            unpack_plane(plane.contiguous(), bits, shift, shift == 0, codes)
        else:
            part = unpack_plane_torch(plane, bits, shift, columns)
            codes = codes | part if shift else part
        shift += bits
    return codes


def packed(format: NestedFormat, codes: torch.Tensor) -> dict[str, torch.Tensor]:
    """Codes uint8 (N, K) as the format's planes."""
    planes, shift = {}, 0
    for name in format.planes_at(format.bits):
        bits = 1 if shift else 2
        if codes.device.type == "cpu":
            plane = torch.empty((codes.shape[0], -(-codes.shape[1] * bits // 8)), dtype=torch.uint8)
            pack_plane(codes.contiguous(), bits, shift, plane)
        else:
            plane = pack_plane_torch(codes, bits, shift)
        planes[name] = plane
        shift += bits
    return planes


def scales_at(
    format: NestedFormat, stored: Mapping[str, torch.Tensor], width: int, rows: slice | torch.Tensor = slice(None)
) -> torch.Tensor:
    """The scales of some rows at a width, float32 (R, blocks)."""
    scaled = stored["scales"][rows].float() * stored[f"factor{width}"][rows].float()
    return scaled.to(TORCH_SCALE_DTYPE[format.scale_dtype]).float()


def decode_rows(format: NestedFormat, matrix: QuantTensor, rows: slice | torch.Tensor, width: int) -> torch.Tensor:
    """See Codec.decode."""
    format.parts_read(*matrix.shape, width)  # refuses a width that it does not serve
    some = {name: matrix.stored[name][rows] for name in format.planes_at(width)}
    codes = codes_at(format, some, matrix.shape[1], width)
    levels = matrix.codebook[format.levels_at(width)]
    return decode(codes, scales_at(format, matrix.stored, width, rows), None, levels, format.plain(width))


def encode_nearest(format: NestedFormat, read_rows: ReadRows, shape: tuple[int, int], name: str) -> QuantTensor:
    """See Codec.encode: blocks are scaled by their largest weight, and each weight goes to the nearest level of the
    widest width, which says its codes at all others. Factors are those of least squares."""
    rows, columns = shape
    if rows < 1 or columns < 1:
        raise KbitError(f"{name} is empty, {rows} x {columns}: there is nothing to quantize")
    levels = torch.from_numpy(format.codebook(columns).copy())
    widest = format.plain(format.bits)
    encoder = Encoder.for_codebook(levels[format.levels_at(format.bits)])
    whole = {
        part: torch.empty(array.shape, dtype=SAFETENSORS_TO_TORCH[array.dtype])
        for part, array in format.parts(rows, columns).items()
    }
    step = max(1, CHUNK_WEIGHTS // columns)
    for start in range(0, rows, step):
        some = slice(start, min(start + step, rows))
        x = check_finite(read_rows(some.start, some.stop), some.start, some.stop, name)
        try:
            stored = store_scales(block_statistics(x, widest)[0], None, widest)
        except KbitError as error:
            raise KbitError(f"{name}: {error}") from None
        codes = encoder.encode(normalise(x, stored["scales"].float(), None, widest))
        stored |= packed(format, codes) | fitted_factors(format, x, codes, stored["scales"].float(), levels)
        for part, array in stored.items():
            whole[part][some] = array
    return QuantTensor(format, shape, whole, levels)


def fitted_factors(
    format: NestedFormat, x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, levels: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Factors of all widths under which the squared error of every row is least, by part name, fp16 (R, 1).

    Args:
        x: the weights, float32 (R, K).
        codes: of the widest width, uint8 (R, K).
        scales: float32 (R, blocks).
        levels: the format's codebook.
    """
    found = {}
    places, scale = codes.int(), spread(scales, format.plain(format.bits), x.shape[1])
    for width in reversed(format.widths):
        values = levels[format.levels_at(width)].index_select(0, (places & (2**width - 1)).view(-1)).view(x.shape)
        values *= scale
        energy = torch.linalg.vecdot(values, values)[:, None]
        factor = torch.linalg.vecdot(x, values)[:, None] / energy.clamp(min=torch.finfo(torch.float32).tiny)
        found[f"factor{width}"] = stored_factors(torch.where(energy > 0, factor, 1.0))
    return found


def stored_factors(factors: torch.Tensor) -> torch.Tensor:
    """Factors (R, 1) as they are stored; one that is not positive would turn a row's weights over, and becomes 1."""
    kept = torch.where((factors > 0) & torch.isfinite(factors), factors, 1.0)
    return kept.clamp(1 / _LARGEST_FACTOR, _LARGEST_FACTOR).half()


def narrowed(matrix: QuantTensor, width: int) -> QuantTensor:
    """What a matrix's store holds up to a width: the same values there, on the same memory.

    Raises:
        UsageError: the store does not serve this width.
    """
    from kbit.formats.nested import NestedFormat

    assert isinstance(matrix.format, NestedFormat)
    format = matrix.format.narrowed(width)
    stored = {name: matrix.stored[name] for name in format.parts(*matrix.shape)}
    return QuantTensor(format, matrix.shape, stored, matrix.codebook[: format.codebook_size])
