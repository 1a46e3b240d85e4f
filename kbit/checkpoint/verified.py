"""Checksums that were verified before are not computed again while the file is the same.

A file is the same while its path, size, modification time and inode are. What is known of it lies in the cache folder,
beside downloads; where that cannot be written, everything is verified every time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from kbit.host.cache_folder import cache_dir
from kbit.host.errors import KbitError
from kbit.host.files import write_durably

Identity = list[int]


def identity(path: Path) -> Identity:
    """Size, modification time (ns) and inode of a file. Raises OSError."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ino]


class VerifiedFiles:
    """What is known of files: parts of them, by their names and sha256 sums, that were found to be right.

    Args:
        forget: begin without what earlier processes have found.
    """

    def __init__(self, *, forget: bool = False) -> None:
        self._forget = forget
        self._known: dict[Path, set[str]] = {}
        self._new: dict[Path, Identity] = {}

    def knows(self, path: Path, name: str, digest: str) -> bool:
        """Whether a part of a file was found to have this sum before, and the file has not changed since."""
        return _entry(name, digest) in self._of(path)

    def add(self, path: Path, name: str, digest: str) -> None:
        """Remember that a part of a file has this sum."""
        if path not in self._new:
            try:
                self._new[path] = identity(path)
            except OSError:
                return
        self._of(path).add(_entry(name, digest))

    def save(self) -> None:
        """Write down what is new, for files that are still what they were when it was found."""
        for path, found in self._new.items():
            try:
                if identity(path) != found:
                    continue
                place = _place(path)
                place.parent.mkdir(parents=True, exist_ok=True)
                write_durably(place, json.dumps({"file": found, "sums": sorted(self._known[path])}).encode())
            except (OSError, KbitError):
                continue  # nothing depends on it but time
        self._new = {}

    def _of(self, path: Path) -> set[str]:
        if path not in self._known:
            self._known[path] = set() if self._forget else set(_recorded(path))
        return self._known[path]


def _entry(name: str, digest: str) -> str:
    """Parts that are alike (the signs of trellises, norms of ones) have one sum, and each may be damaged by itself."""
    return f"{digest} {name}"


def _place(path: Path) -> Path:
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()
    return cache_dir() / "verified" / f"{name[:32]}.json"


def _recorded(path: Path) -> Iterable[str]:
    try:
        record = json.loads(_place(path).read_text(encoding="utf-8"))
        if record["file"] == identity(path) and all(isinstance(digest, str) for digest in record["sums"]):
            return list(record["sums"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError, KbitError):
        pass  # no record, or none that can be read: verify
    return ()
