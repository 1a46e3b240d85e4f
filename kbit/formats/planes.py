"""Packing codes of k bits into bit planes: exactly k bits per code, in memory and on disk.

The layout is pictured in kernels/cpu/codecs/bitplanes.h. On the CPU the compiled routines do the work; on other devices
the same layout comes from shifts and sums in torch (`pack_plane_torch`, `unpack_plane_torch`), which are also what
the compiled ones are tested against.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kbit.formats.plane_codes import pack_plane, unpack_plane
from kbit.formats.quant_format import plane_widths


def pack(codes: torch.Tensor, bits: int) -> tuple[torch.Tensor, ...]:
    """Pack codes (N, K) uint8, each below 2^bits, into planes (N, ceil(K * width / 8)) uint8, widest first."""
    planes = []
    shift = 0
    for width in plane_widths(bits):
        if codes.device.type == "cpu":
            rows, columns = codes.shape
            plane = torch.empty((rows, -(-columns * width // 8)), dtype=torch.uint8)
            pack_plane(codes.contiguous(), width, shift, plane)
        else:
            plane = pack_plane_torch(codes, width, shift)
        planes.append(plane)
        shift += width
    return tuple(planes)


def unpack(planes: Sequence[torch.Tensor], bits: int, columns: int) -> torch.Tensor:
    """The reverse of pack: codes (N, columns) uint8."""
    rows = planes[0].shape[0]
    codes = torch.empty((rows, columns), dtype=torch.uint8, device=planes[0].device)
    shift = 0
    for width, plane in zip(plane_widths(bits), planes, strict=True):
        if codes.device.type == "cpu":
            unpack_plane(plane.contiguous(), width, shift, shift == 0, codes)
        else:
            part = unpack_plane_torch(plane, width, shift, columns)
            codes = part if shift == 0 else codes | part
        shift += width
    return codes


def pack_plane_torch(codes: torch.Tensor, width: int, shift: int) -> torch.Tensor:
    """Bits [shift, shift + width) of codes (N, K) as one plane, in plain torch."""
    per_byte = 8 // width
    rows, columns = codes.shape
    field = (codes >> shift) & ((1 << width) - 1)
    field = torch.nn.functional.pad(field, (0, -columns % per_byte)).view(rows, -1, per_byte)
    places = torch.arange(per_byte, dtype=torch.uint8, device=codes.device) * width
    return (field << places).sum(dim=-1, dtype=torch.uint8)


def unpack_plane_torch(plane: torch.Tensor, width: int, shift: int, columns: int) -> torch.Tensor:
    """A plane's bits as codes (N, columns), moved up to bit `shift`, in plain torch."""
    per_byte = 8 // width
    places = torch.arange(per_byte, dtype=torch.uint8, device=plane.device) * width
    field = (plane[:, :, None] >> places) & ((1 << width) - 1)
    return field.flatten(1)[:, :columns] << shift
