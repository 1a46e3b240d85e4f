"""How many threads to start, and which instruction set runs: from files as Linux writes them, and from the machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kbit import _native
from kbit.host.cpu import default_threads, instruction_set
from kbit.host.errors import UnsupportedError


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """8 processors on 4 cores, of which this process may use 6 on 3 cores and 1 on a fourth; no control groups."""
    for cpu in range(8):
        write(tmp_path, f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", f"{cpu % 4},{cpu % 4 + 4}")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 4, 5, 6}, raising=False)
    return tmp_path


class TestDefaultThreads:
    def test_two_threads_of_a_core_count_once(self, machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert default_threads(machine) == 4
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2, 6})
        assert default_threads(machine) == 1

    def test_where_the_system_does_not_tell(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3, 9}, raising=False)
        assert default_threads(tmp_path) == 3
        monkeypatch.delattr(os, "sched_getaffinity")
        monkeypatch.setattr(os, "cpu_count", lambda: 5)
        assert default_threads(tmp_path) == 5
        monkeypatch.setattr(os, "cpu_count", lambda: None)
        assert default_threads(tmp_path) == 1

    @pytest.mark.parametrize(
        ("limits", "expected"),
        [
            ({"": "max 100000"}, 4),
            ({"a/b": "250000 100000"}, 2),
            ({"a": "300000 100000", "a/b": "max 100000"}, 3),
            ({"": "150000 100000", "a": "300000 100000"}, 1),
            ({"a": "50000 100000"}, 1),
            ({"a": "9000000 100000"}, 4),
            ({"a": "damaged"}, 4),
            ({"a": "100000 0"}, 4),
        ],
    )
    def test_control_groups(self, machine: Path, limits: dict[str, str], expected: int) -> None:
        """The tightest limit of a group or one around it counts, rounded down to whole processors."""
        write(machine, "proc/self/cgroup", "0::/a/b")
        for group, limit in limits.items():
            write(machine, f"sys/fs/cgroup/{group}/cpu.max", limit)
        assert default_threads(machine) == expected

    @pytest.mark.parametrize(("quota", "expected"), [("-1", 4), ("200000", 2), ("99999", 1)])
    def test_control_groups_of_version_1(self, machine: Path, quota: str, expected: int) -> None:
        write(machine, "proc/self/cgroup", "5:memory:/x\n4:cpu,cpuacct:/docker/7\n0::/")
        write(machine, "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", quota)
        write(machine, "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000")
        assert default_threads(machine) == expected

    def test_this_machine(self) -> None:
        assert 1 <= default_threads() <= (os.cpu_count() or 1)


def test_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KBIT_CPU_ISA", raising=False)
    assert instruction_set() == _native.instruction_sets()[-1]
    monkeypatch.setenv("KBIT_CPU_ISA", "scalar")
    assert instruction_set() == "scalar"
    monkeypatch.setenv("KBIT_CPU_ISA", "mmx")
    with pytest.raises(UnsupportedError, match="mmx"):
        instruction_set()


def test_kbit_info_shows_the_machine_and_needs_no_torch() -> None:
    code = "import sys; from kbit.cli.main import build; app = build([]); app({!r}, standalone_mode=False); sys.exit('torch' in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if name != "KBIT_CPU_ISA"}
    report, text = (
        subprocess.run(
            [sys.executable, "-c", code.format(arguments)], capture_output=True, text=True, check=True, env=environment
        ).stdout
        for arguments in (["info", "--json"], ["info"])
    )
    found = json.loads(report)
    assert found["instruction_set"] == _native.instruction_sets()[-1]
    assert found["instruction_sets"] == _native.instruction_sets()
    assert found["threads"] == default_threads()
    assert f"{found['instruction_set']} on {found['machine']}" in text


def test_what_runs_here_is_compiled_in() -> None:
    compiled = _native.compiled_sets()
    assert "scalar" in compiled
    assert {*_native.instruction_sets(), *_native.emulated_sets()} <= set(compiled)
