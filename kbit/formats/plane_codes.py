"""Bits of codes as one plane of bytes and back, in the host's memory: compiled, or in numpy where kbit is not compiled.

A source tree carried to a machine with a GPU runs on torch and Triton alone (`kbit/__init__.py`). The bytes are the
same either way; kbit.formats.planes has the layout.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    Codes = NDArray[np.uint8] | torch.Tensor

__all__ = ["pack_plane", "pack_plane_numpy", "unpack_plane", "unpack_plane_numpy"]


def pack_plane_numpy(codes: Codes, width: int, shift: int, plane: Codes) -> None:
    """Bits [shift, shift + width) of codes into a plane.

    Args:
        codes: uint8 (N, K), in the host's memory.
        width: 1, 2, 4 or 8.
        shift: lowest bit of the codes that belongs to the plane.
        plane: uint8 (N, ceil(K * width / 8)), contiguous: is written.
    """
    given = np.asarray(codes)
    rows, columns = given.shape
    per_byte = 8 // width
    padded = np.pad((given >> shift) & ((1 << width) - 1), ((0, 0), (0, -columns % per_byte)))
    places = np.arange(per_byte, dtype=np.uint8) * width
    fields = padded.reshape(rows, -(-columns // per_byte), per_byte) << places
    np.asarray(plane)[...] = np.bitwise_or.reduce(fields, axis=-1)


def unpack_plane_numpy(plane: Codes, width: int, shift: int, first: bool, codes: Codes) -> None:
    """The reverse: a plane's bits, moved up to bit `shift`, into codes.

    Args:
        plane, width, shift, codes: as in `pack_plane_numpy`; codes are written.
        first: the other bits of the codes become 0; else they stay as they are.
    """
    out: Any = np.asarray(codes)
    places = np.arange(8 // width, dtype=np.uint8) * width
    fields = (np.asarray(plane)[:, :, None] >> places) & ((1 << width) - 1)
    values = fields.reshape(len(fields), fields.shape[1] * fields.shape[2])[:, : out.shape[1]] << shift
    out[...] = values if first else out | values


try:
    from kbit._native import pack_plane, unpack_plane
except ImportError as error:
    if error.name != "kbit._native":
        raise
    pack_plane, unpack_plane = pack_plane_numpy, unpack_plane_numpy
