"""What processes take: time of one command, and memory of several together (Linux)."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, sleep

POLL = 0.02  # seconds between two looks at the processes


@dataclass(frozen=True)
class Took:
    """What a command took.

    Attributes:
        seconds: from its start to its end.
        cpu_seconds: of all its threads, the system's time among them.
        output: its standard output.
    """

    seconds: float
    cpu_seconds: float
    output: str


def time_command(command: Sequence[object]) -> Took:
    """Run a command to its end.

    Raises:
        RuntimeError: it failed.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        begin = perf_counter()
        process = _start(command, out, errors)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = perf_counter() - begin
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        errors.seek(0)
        if process.returncode != 0:
            raise RuntimeError(f"{command}: exit code {process.returncode}:\n{errors.read()[-1500:]}")
        return Took(seconds, usage.ru_utime + usage.ru_stime, out.read())


def most_memory(commands: Sequence[Sequence[object]]) -> float:
    """Run commands at once: the most bytes that they took together, each page that they share counted once (PSS).

    The moment counts at which all of them run; that includes their start.

    Raises:
        RuntimeError: one failed.
    """
    with tempfile.TemporaryFile("w+") as errors:
        processes = [_start(command, subprocess.DEVNULL, errors) for command in commands]
        most = 0
        try:
            while all(process.poll() is None for process in processes):
                with suppress(OSError):  # one ended meanwhile
                    most = max(most, sum(proportional_bytes(process.pid) for process in processes))
                sleep(POLL)
            codes = [process.wait() for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        if any(codes):
            errors.seek(0)
            raise RuntimeError(f"{commands[0]}: exit codes {codes}:\n{errors.read()[-1500:]}")
    return most


def proportional_bytes(pid: int) -> int:
    """A process's memory, pages that several processes map divided between them.

    Raises:
        OSError: it is gone, or the system does not tell.
    """
    found = re.search(r"^Pss:\s*(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    if found is None:
        raise ProcessLookupError(pid)
    return int(found[1]) * 1024


def _start(command: Sequence[object], out: object, errors: object) -> subprocess.Popen[str]:
    """Away from the checkout, and without what would make another Python look for packages here."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    return subprocess.Popen(
        [str(word) for word in command],
        stdin=subprocess.DEVNULL,
        stdout=out,  # type: ignore[call-overload]
        stderr=errors,
        text=True,
        cwd=tempfile.gettempdir(),
        env=environment,
    )
