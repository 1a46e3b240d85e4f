"""Every point this machine has measured, by content: nothing is measured twice, whatever folder it was asked for in.

One small file a point, named by its key, in kbit's cache folder. Files appear whole or not at all, so any number of
sweeps may write at once; what is damaged counts as not there and is measured again. Imports no torch.
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

from kbit.host.cache_folder import cache_dir
from kbit.host.errors import KbitError
from kbit.scaling.points import Point, read_points

_KEY = re.compile(r"[0-9a-f]{64}")


class PointStore:
    """Points by key.

    Args:
        folder: where they are; by default `points` in the cache folder.

    Raises:
        KbitError: there is no cache folder.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = cache_dir() / "points" if folder is None else folder

    def get(self, key: str) -> Point | None:
        """The point of a key, or None."""
        return self._read(self._path(key), key)

    def put(self, point: Point) -> None:
        """Keep a point.

        Raises:
            KbitError: the file cannot be written.
        """
        path = self._path(point.key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # A name of its own: two sweeps may finish the same point at once.
            handle, name = tempfile.mkstemp(prefix=".new-", dir=path.parent)
            temporary = Path(name)
            try:
                with open(handle, "wb") as file:
                    file.write(point.to_json().encode() + b"\n")
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, path)
            except OSError:
                temporary.unlink(missing_ok=True)
                raise
        except OSError as error:
            raise KbitError(
                f"{path}: cannot be written ({error.strerror or error}); set KBIT_CACHE to another folder, or measure "
                "with --no-cache"
            ) from error

    def all(self) -> list[Point]:
        """Every point, the oldest first."""
        found = [self._read(path, path.stem) for path in self.folder.glob("??/*.json")]
        return sorted((point for point in found if point is not None), key=lambda point: point.created)

    def _path(self, key: str) -> Path:
        if not _KEY.fullmatch(key):
            raise ValueError(f"{key!r} is not the key of a point")
        return self.folder / key[:2] / f"{key}.json"

    @staticmethod
    def _read(path: Path, key: str) -> Point | None:
        try:
            points = read_points(path)
        except KbitError:
            return None
        return points[0] if len(points) == 1 and points[0].key == key else None
