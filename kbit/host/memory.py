"""Memory of this machine, and how much of it this process may still take."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kbit.host.cpu import control_groups

# A limit of so much is none: version 1 of control groups writes the largest multiple of a page for "max".
_UNLIMITED = 1 << 60


@dataclass(frozen=True)
class Room:
    """What one bound leaves this process.

    Attributes:
        nbytes: still to be had.
        limit: the bound itself.
        what: names it, for people: "ulimit -v".
        mapped: files that are mapped count as taken, read or not.
    """

    nbytes: int
    limit: int
    what: str
    mapped: bool = False


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this process may still take without swapping, within its limits; None where nothing tells.

    Args:
        root: where /proc and /sys are (for tests).
    """
    rooms = [room.nbytes for room in limits(root)]
    machine = machine_memory(root)
    return min([*rooms, *([] if machine is None else [machine])], default=None)


def machine_memory(root: Path = Path("/")) -> int | None:
    """Bytes that processes may still take without swapping; None where the system does not tell."""
    if (found := _number(root / "proc/meminfo", "MemAvailable:")) is not None:
        return found * 1024
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, OSError, ValueError):
        return None


def limits(root: Path = Path("/")) -> list[Room]:
    """What limits set for this process leave it: `ulimit -v` and `-d`, and every control group around it."""
    return [*_resource_limits(root), *_group_limits(root)]


def _resource_limits(root: Path) -> Iterator[Room]:
    try:
        import resource
    except ImportError:  # Windows
        return
    named = (("ulimit -v", resource.RLIMIT_AS, "VmSize:"), ("ulimit -d", resource.RLIMIT_DATA, "VmData:"))
    for what, kind, key in named:
        most = resource.getrlimit(kind)[0]
        if most == resource.RLIM_INFINITY:
            continue
        taken = _number(root / "proc/self/status", key)
        if taken is not None:
            yield Room(max(0, most - taken * 1024), most, what, mapped=key == "VmSize:")


def _group_limits(root: Path) -> Iterator[Room]:
    """Pages of files count as free: the kernel takes them back."""
    for version, folder in control_groups("memory", root):
        limit = folder / ("memory.max" if version == 2 else "memory.limit_in_bytes")
        current = folder / ("memory.current" if version == 2 else "memory.usage_in_bytes")
        most, taken = _whole(limit), _whole(current)
        if most is None or taken is None or most >= _UNLIMITED:
            continue
        statistics = folder / "memory.stat"
        files = _number(statistics, "file" if version == 2 else "total_cache") or 0
        shared = _number(statistics, "shmem" if version == 2 else "total_shmem") or 0
        yield Room(max(0, most - taken + max(0, files - shared)), most, f"the control group's {limit}")


def _whole(file: Path) -> int | None:
    """The number that a file holds; None for "max", or where there is none."""
    try:
        text = file.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _number(file: Path, key: str) -> int | None:
    """The number after a key at the beginning of a line."""
    try:
        with file.open(encoding="ascii", errors="replace") as lines:
            for line in lines:
                words = line.split()
                if len(words) > 1 and words[0] == key and words[1].isdigit():
                    return int(words[1])
    except OSError:
        pass
    return None
