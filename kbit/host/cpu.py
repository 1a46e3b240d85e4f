"""What this machine's processors offer: cores this process may use, and instruction sets. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from kbit.host.errors import UnsupportedError


def instruction_set() -> str:
    """The instruction set whose kernels run: the best this machine has, or what KBIT_CPU_ISA names.

    Raises:
        UnsupportedError: KBIT_CPU_ISA names one that this machine does not have.
    """
    from kbit import _native

    try:
        return _native.Context(None, 1).isa
    except ValueError as error:
        raise UnsupportedError(str(error)) from None


def default_threads(root: Path = Path("/")) -> int:
    """Physical cores this process may run on: a second thread on a core would only share its arithmetic units.

    Counts the processors of the affinity mask, two of one core once, and no more than the control group's processor
    time allows (a container with 1.5 processors gets 1: with 2 busy threads it would be stopped every few
    milliseconds).

    Args:
        root: where /proc and /sys are (for tests).
    """
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    return max(1, min([_cores(cpus, root), *(int(limit) for limit in _time_limits(root))]))


def _cores(cpus: set[int], root: Path) -> int:
    """Physical cores of some processors; every processor counts where the system does not tell."""
    siblings = set()
    for cpu in cpus:
        text = _read(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        siblings.add(f"cpu{cpu}" if text is None else text)
    return len(siblings)


def _time_limits(root: Path) -> Iterator[float]:
    """Processors' worth of time that each control group around this process allows it."""
    for kind, folder in control_groups("cpu", root):
        if kind == 2:
            yield from _ratio((_read(folder / "cpu.max") or "").split())
        else:
            parts = (_read(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
            yield from _ratio([part or "" for part in parts])


def control_groups(controller: str, root: Path = Path("/")) -> Iterator[tuple[int, Path]]:
    """(version, folder) of every control group around this process that may limit what `controller` counts.

    Args:
        controller: "cpu", "memory".
        root: where /proc and /sys are (for tests).
    """
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            yield from ((2, folder) for folder in _upwards(root / "sys/fs/cgroup", path))
        elif controller in controllers.split(","):
            yield from ((1, folder) for folder in _upwards(root / "sys/fs/cgroup" / controllers, path))


def _upwards(mount: Path, path: str) -> Iterator[Path]:
    """The folder of a control group and those of the groups around it. A container may see only the last one."""
    relative = PurePosixPath(path.lstrip("/"))
    for group in (relative, *relative.parents):
        yield mount / group


def _ratio(numbers: list[str]) -> Iterator[float]:
    """["150000", "100000"] -> 1.5; nothing for "max", for -1, or for what is not there."""
    if len(numbers) == 2 and numbers[0].isdigit() and numbers[1].isdigit() and int(numbers[1]) > 0:
        yield int(numbers[0]) / int(numbers[1])


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return None
