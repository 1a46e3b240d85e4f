"""What limits leave this process: control groups of both versions, ulimits, and what a machine says it has."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kbit.host.memory import Room, available_memory, limits

MB = 1 << 20


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def test_version_2(tmp_path: Path) -> None:
    """Every group around the process counts; pages of files are free, those of shared memory are not."""
    root = write(
        tmp_path,
        {
            "proc/meminfo": f"MemTotal: 8 kB\nMemAvailable: {100 * 1024} kB\n",
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/memory.max": f"{90 * MB}\n",
            "sys/fs/cgroup/a/memory.current": f"{80 * MB}\n",
            "sys/fs/cgroup/a/memory.stat": f"anon {30 * MB}\nfile {50 * MB}\nshmem {20 * MB}\n",
            "sys/fs/cgroup/a/b/memory.max": "max\n",
            "sys/fs/cgroup/a/b/memory.current": "5\n",
        },
    )
    group = f"the control group's {root / 'sys/fs/cgroup/a/memory.max'}"
    assert Room(40 * MB, 90 * MB, group) in limits(root)
    assert available_memory(root) == 40 * MB
    (root / "sys/fs/cgroup/a/memory.max").write_text("max\n")
    assert available_memory(root) == 100 * MB


def test_version_1(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/x\n2:cpu,cpuacct:/x\n",
            "sys/fs/cgroup/memory/x/memory.limit_in_bytes": f"{60 * MB}\n",
            "sys/fs/cgroup/memory/x/memory.usage_in_bytes": f"{50 * MB}\n",
            "sys/fs/cgroup/memory/x/memory.stat": f"cache 1\ntotal_cache {15 * MB}\ntotal_shmem {5 * MB}\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{50 * MB}\n",
        },
    )
    (room,) = [room for room in limits(root) if "control group" in room.what]
    assert (room.nbytes, room.limit) == (20 * MB, 60 * MB)


def test_more_than_the_limit_is_none_left(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": "10\n",
            "sys/fs/cgroup/memory.current": "20\n",
        },
    )
    assert available_memory(root) == 0


def test_ulimits() -> None:
    """`ulimit -v` and `-d` leave what the process has not taken yet."""
    if not Path("/proc/self/status").exists():
        pytest.skip("this system has no /proc")
    code = (
        "import json, resource\n"
        "resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (4 << 30, 4 << 30))\n"
        "from kbit.host.memory import limits\n"
        "print(json.dumps([[room.what, room.nbytes, room.limit, room.mapped] for room in limits()]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    rooms = {what: rest for what, *rest in json.loads(done.stdout)}
    for what, limit, mapped in (("ulimit -v", 8 << 30, True), ("ulimit -d", 4 << 30, False)):
        nbytes, most, counts_files = rooms[what]
        assert (most, counts_files) == (limit, mapped)
        assert limit - (1 << 30) < nbytes < limit
