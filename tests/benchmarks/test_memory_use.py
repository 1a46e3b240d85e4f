"""What benchmarks/memory_use.py says of processes: their time, and memory that they share counted once."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
from module_cases import module_of

MEGABYTE = 1 << 20
SHARED = 64 * MEGABYTE
# Maps a file, touches every page of it, and stays for a while.
MAPS = """
import mmap, sys, time
with open(sys.argv[1], "rb") as file:
    mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
sum(mapped[::4096])
time.sleep(1.5)
"""


@pytest.fixture(scope="module")
def memory_use() -> ModuleType:
    return module_of("benchmarks/memory_use.py")


def test_a_command_and_what_it_says(memory_use: ModuleType) -> None:
    took = memory_use.time_command([sys.executable, "-c", "sum(range(10**6)); print('done')"])
    assert took.output == "done\n"
    assert took.cpu_seconds > 0
    assert took.seconds > 0


def test_a_command_that_fails_is_named(memory_use: ModuleType) -> None:
    with pytest.raises(RuntimeError, match=r"exit code 3:\nbroken"):
        memory_use.time_command([sys.executable, "-c", "import sys; print('broken', file=sys.stderr); sys.exit(3)"])
    with pytest.raises(RuntimeError, match=r"exit codes \[3\]"):
        memory_use.most_memory([[sys.executable, "-c", "import sys; sys.exit(3)"]])


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="Linux tells what processes share")
def test_what_two_processes_map_counts_once(memory_use: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(bytes(SHARED))
    command = [sys.executable, "-c", MAPS, file]
    one, two = memory_use.most_memory([command]), memory_use.most_memory([command] * 2)
    assert SHARED < one < 2 * SHARED
    assert SHARED < two < 2 * SHARED
