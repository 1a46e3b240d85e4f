"""Writing large files of aligned arrays, a few megabytes at a time."""

from __future__ import annotations

from io import RawIOBase
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ALIGN = 64
# Written at once, from multiples of it on: what Linux then holds in huge pages, which all that map the file share.
# Decoding on one thread is a sixth faster with them (docs/measurements.md).
PIECE_BYTES = 8 << 20


class Pieces:
    """Appends to a file, or to a part of one, a piece at a time.

    Args:
        file: only written to between other writers' pieces: the place is sought for each.
        begin: where in the file.
        piece_bytes: written at once.

    Attributes:
        size: where the next byte goes.
    """

    def __init__(self, file: RawIOBase, begin: int = 0, piece_bytes: int = PIECE_BYTES) -> None:
        self._file = file
        self._piece = bytearray(piece_bytes)
        self._used = 0
        self.size = begin

    def write(self, data: bytes | memoryview) -> None:
        rest = memoryview(data)
        while len(rest):
            taken = min(len(rest), len(self._piece) - self._used)
            self._piece[self._used : self._used + taken] = rest[:taken]
            self._used += taken
            self.size += taken
            rest = rest[taken:]
            if self._used == len(self._piece):
                self.flush()

    def append(self, data: NDArray[np.uint8]) -> int:
        """Writes an array at the next aligned place; where that is. 64 bytes lie between arrays: kernels read ahead."""
        self.write(b"\0" * gap(self.size))
        begin = self.size
        self.write(data.data)
        return begin

    def flush(self) -> None:
        self._file.seek(self.size - self._used)
        write_all(self._file, memoryview(self._piece)[: self._used])
        self._used = 0


def gap(size: int) -> int:
    """Bytes between what ends at `size` and the next array."""
    return -size % ALIGN + ALIGN


def write_all(file: RawIOBase, data: memoryview) -> None:
    """All of it, where the file now is."""
    while len(data):
        written = file.write(data)
        assert written is not None  # a file that blocks
        data = data[written:]
