"""What a disk holds after a process was killed, or the power failed, at any moment of some work.

The work is done once, watched: before each call that could have changed a file, what the disk holds is recorded, and
what has been synced by then. From that come the images that a death leaves: what the system had (a killed process loses
nothing of it), and what a power cut may leave of it. Of what was not synced it may keep names without data, or data
without names: files then are empty, or as long as they were but zeros, and renamed files stand where they stood before.
(As ALICE has it: Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014.)
"""

from __future__ import annotations

import os
import random
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

# Functions of C that change files, or that Python calls right after one that does.
_CALLS = frozenset(
    (
        "write",
        "flush",
        "truncate",
        "ftruncate",
        "close",
        "rename",
        "replace",
        "unlink",
        "rmdir",
        "mkdir",
        "open",
        "fsync",
    )
)

Tree = dict[str, "bytes | None"]  # of each path below a folder its content; None: a folder
_Names = dict[int, dict[str, int]]


@dataclass
class _Moment:
    """What there was: the content of every file and the entries of every folder, by number, and what of them is synced."""

    data: dict[int, bytes]
    names: _Names
    synced_data: dict[int, bytes]
    synced_names: _Names


@dataclass
class Recorder:
    """Watches a folder while something is done in it.

    Args:
        root: the folder; what is in it at the beginning counts as synced.
    """

    root: Path
    moments: list[_Moment] = field(default_factory=list)
    _numbers: dict[int, int] = field(default_factory=dict)
    _next: int = 1
    _synced_data: dict[int, bytes] = field(default_factory=dict)
    _synced_names: _Names = field(default_factory=dict)

    def run(self, work: Callable[[], object]) -> None:
        """Does the work, in this thread. Nothing is really synced meanwhile."""
        data, names = self._look()
        self._synced_data, self._synced_names = dict(data), {number: dict(found) for number, found in names.items()}

        def watch(frame: Any, event: str, function: Any) -> None:
            if event == "c_call" and getattr(function, "__name__", "") in _CALLS:
                self._record()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", self._sync)
            sys.setprofile(watch)
            try:
                work()
            finally:
                sys.setprofile(None)
        self._record()

    def killed(self) -> list[Tree]:
        """What is left where the process dies."""
        return _distinct(self._tree(m.names, m.data, m) for m in self.moments)

    def power_cuts(self) -> list[Tree]:
        """What may be left where the power fails."""
        draw = random.Random(0)
        return _distinct(tree for moment in self.moments for tree in self._cuts(moment, draw))

    def last_power_cuts(self) -> list[Tree]:
        """The same, after all was done."""
        return _distinct(self._cuts(self.moments[-1], random.Random(0)))

    def _cuts(self, m: _Moment, draw: random.Random) -> Iterator[Tree]:
        zeros = {
            number: m.synced_data.get(number, b"") + b"\0" * (len(data) - len(m.synced_data.get(number, b"")))
            for number, data in m.data.items()
        }
        for names in (m.names, {**m.names, **m.synced_names}, m.synced_names):
            for data in (m.data, m.synced_data, zeros):
                if names is not m.names or data is not m.data:
                    yield self._tree(names, data, m)
        for _ in range(2):  # of each file something else
            mixed = {number: draw.choice((m.data, m.synced_data, zeros)).get(number, b"") for number in m.data}
            yield self._tree(m.names, mixed, m)

    def _tree(self, names: _Names, data: dict[int, bytes], m: _Moment) -> Tree:
        """The files by path, from folders' entries; of files that the data lack nothing was written."""
        found: Tree = {}
        stack = [("", self._numbers[self.root.stat().st_ino])]
        while stack:
            above, number = stack.pop()
            for name, inner in names.get(number, {}).items():
                path = f"{above}/{name}" if above else name
                if inner in m.names or inner in m.synced_names:
                    found[path] = None
                    stack.append((path, inner))
                else:
                    found[path] = data.get(inner, m.synced_data.get(inner, b""))
        return found

    def _record(self) -> None:
        data, names = self._look()
        synced = {number: dict(found) for number, found in self._synced_names.items()}
        moment = _Moment(data, names, dict(self._synced_data), synced)
        if not self.moments or moment != self.moments[-1]:
            self.moments.append(moment)

    def _sync(self, descriptor: int) -> None:
        status = os.fstat(descriptor)
        data, names = self._look()
        number = self._numbers.get(status.st_ino)
        if number is None:
            return
        if stat.S_ISDIR(status.st_mode):
            self._synced_names[number] = dict(names.get(number, {}))
        else:
            self._synced_data[number] = data.get(number, b"")

    def _look(self) -> tuple[dict[int, bytes], _Names]:
        """Contents and entries. A file that is new gets a new number, since file systems give theirs again."""
        data: dict[int, bytes] = {}
        names: _Names = {}
        present: dict[int, int] = {}

        def number_of(inode: int) -> int:
            if inode not in present:
                present[inode] = self._numbers.get(inode) or self._new()
            return present[inode]

        folders = [self.root]
        while folders:
            folder = folders.pop()
            entries: dict[str, int] = {}
            names[number_of(folder.stat().st_ino)] = entries
            for entry in os.scandir(folder):
                entries[entry.name] = number = number_of(entry.inode())
                if entry.is_dir(follow_symlinks=False):
                    folders.append(Path(entry.path))
                else:
                    data[number] = Path(entry.path).read_bytes()
        self._numbers = present
        return data, names

    def _new(self) -> int:
        self._next += 1
        return self._next


def put(tree: Tree, folder: Path) -> None:
    """Makes a folder of an image."""
    folder.mkdir(parents=True)
    for path, data in sorted(tree.items()):
        if data is None:
            (folder / path).mkdir(exist_ok=True)
        else:
            (folder / path).write_bytes(data)


def some(trees: Sequence[Tree], most: int, most_of_all: int = 1 << 30) -> Iterator[Tree]:
    """Images from the first to the last, no more than so many; than `most_of_all` where KBIT_FAULTS is "all"."""
    most = most_of_all if os.environ.get("KBIT_FAULTS") == "all" else most
    if len(trees) <= most:
        yield from trees
        return
    for index in range(most):
        yield trees[index * (len(trees) - 1) // (most - 1)]


def _distinct(trees: Any) -> list[Tree]:
    found: list[Tree] = []
    seen = set()
    for tree in trees:
        key = tuple(sorted((path, data) for path, data in tree.items() if data is not None)) + tuple(sorted(tree))
        if key not in seen:
            seen.add(key)
            found.append(tree)
    return found
