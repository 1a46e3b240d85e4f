"""A reference's logits in a file that several processes read, and that a killed run leaves for the next one.

StoredLogits (kbit.evaluate.logits) serves one process and goes with it. A sweep compares a hundred models with one,
side by side and perhaps in two sittings: one process writes the reference's logits window by window (WritingLogits),
the others map the file (SharedLogits).

    <name>.logits   float32 (W, S, V), windows one after the other, exactly as computed
    <name>.done     one line for each window that is complete: its index and the CRC-32 of its bytes

A window counts once its line is there, and a run that goes on from a killed one checks the sums first.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from kbit.evaluate.logits import Evaluable, KeptLogits, ModelLogits, check_room, logits_bytes, pieces, stored_bytes
from kbit.host.errors import KbitError
from kbit.text.windows import Windows


def logits_complete(path: Path, windows: Windows) -> bool:
    """Whether all windows have been written. Looks at the list only: for the process that reads."""
    return path.is_file() and len(_done(path)) == windows.count


class WritingLogits(KeptLogits):
    """A model's logits, computed once and written as they are used; windows a killed run has left are read.

    Used for one pass over all windows; afterwards the file is complete.

    Args:
        model: the reference.
        windows: the windows all comparisons run on.
        path: the file to make or to go on with (beside it, the list of what is done).

    Raises:
        KbitError: the disk has less room than the file needs.
    """

    def __init__(self, model: Evaluable, windows: Windows, path: Path) -> None:
        self._live, self._path = ModelLogits(model), path
        super().__init__(windows, self._live.vocab_size)
        self._shape = (windows.count, windows.scored_per_window, self.vocab_size)
        needed = logits_bytes(windows, self.vocab_size)
        self._window_bytes = needed // windows.count
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            have = path.stat().st_size if path.is_file() else 0
            if have not in (0, needed):
                _list(path).unlink(missing_ok=True)
                path.unlink()
                have = 0
            check_room(path.parent, needed, _allocated(path))
            if not have:
                _list(path).unlink(missing_ok=True)
                with path.open("wb") as file:
                    file.truncate(needed)
            # Plain writes, not a mapping: a disk that fills up is then an error and not the end of the process.
            self._file = path.open("r+b", buffering=0)
            sums = _done(path)
            self._done = {index for index in sums if index < windows.count and self._crc(index) == sums[index]}
            _list(path).write_text("".join(f"{index} {sums[index]}\n" for index in sorted(self._done)))
        except OSError as error:
            raise _cannot(path, error) from error

    def _window(self, index: int) -> Iterator[torch.Tensor]:
        if index in self._done:
            yield from _pieces(self._read(index), self._windows)
            return
        at, crc = index * self._window_bytes, 0
        for logits in self._live.window(self._windows, index):
            data = stored_bytes(logits)
            crc = zlib.crc32(data, crc)
            self._write(at, data)
            at += len(data)
            yield logits
        try:
            with _list(self._path).open("a") as file:
                file.write(f"{index} {crc}\n")
        except OSError as error:
            raise _cannot(self._path, error) from error
        self._done.add(index)

    def close(self) -> None:
        """Close the file, which stays."""
        self._file.close()

    def _write(self, at: int, data: memoryview) -> None:
        try:
            self._file.seek(at)
            while data:  # one call writes 2 GiB at most
                data = data[self._file.write(data) :]
        except OSError as error:
            raise _cannot(self._path, error) from error

    def _read(self, index: int) -> NDArray[np.float32]:
        rows = np.empty(self._shape[1:], np.float32)
        self._file.seek(index * self._window_bytes)
        view = rows.data.cast("B")
        at = 0
        while at < len(view):
            got = self._file.readinto(view[at:])
            if not got:
                raise KbitError(f"{self._path}: the file of the reference's logits was cut short by another program")
            at += got
        return rows

    def _crc(self, index: int) -> int:
        return zlib.crc32(self._read(index).data.cast("B"))


class SharedLogits(KeptLogits):
    """Logits that WritingLogits has written, mapped.

    Raises:
        KbitError: the file is not there, not complete, or of other windows or another vocabulary.
    """

    def __init__(self, windows: Windows, vocab_size: int, path: Path) -> None:
        super().__init__(windows, vocab_size)
        try:
            if not logits_complete(path, windows) or path.stat().st_size != logits_bytes(windows, vocab_size):
                raise KbitError(
                    f"{path}: the reference's logits are not there: was the folder changed by another program?"
                )
            shape = (windows.count, windows.scored_per_window, vocab_size)
            self._file: NDArray[np.float32] | None = np.memmap(path, np.float32, "r", shape=shape)
        except OSError as error:
            raise _cannot(path, error) from error

    def _window(self, index: int) -> Iterator[torch.Tensor]:
        assert self._file is not None, "closed"
        yield from _pieces(self._file[index], self._windows)

    def close(self) -> None:
        """Let go of the mapping."""
        self._file = None


def _pieces(rows: NDArray[np.float32], windows: Windows) -> Iterator[torch.Tensor]:
    """The scored positions of a window (S, V) as LogitsSource.window yields them."""
    for start, stop in pieces(windows, rows.shape[1]):
        # A copy: torch has no tensors that are only read.
        yield torch.from_numpy(np.array(rows[start - windows.first_scored : stop - windows.first_scored]))


def _cannot(path: Path, error: OSError) -> KbitError:
    return KbitError(f"{path}: the reference's logits cannot be kept there: {error.strerror or error}")


def _list(path: Path) -> Path:
    return path.with_suffix(".done")


def _done(path: Path) -> dict[int, int]:
    """Index and checksum of each complete window; a line that a kill cut short does not count."""
    try:
        text = _list(path).read_text(encoding="ascii")
    except (FileNotFoundError, UnicodeDecodeError):
        return {}
    found = {}
    for line in text.split("\n")[:-1]:
        index, _, crc = line.partition(" ")
        if index.isdigit() and crc.isdigit():
            found[int(index)] = int(crc)
    return found


def _allocated(path: Path) -> int:
    """Bytes the file occupies already; of a sparse one, only what was written."""
    if not path.is_file():
        return 0
    status = path.stat()
    return status.st_blocks * 512 if hasattr(status, "st_blocks") else status.st_size
