"""Files that are there whole or not at all: through deaths, power cuts, full disks and read-only folders."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fault_cases import Recorder

from kbit.host.files import fsync_folder, write_durably

OLD, NEW = b"old" * 400, b"newer" * 300


@pytest.mark.parametrize("before", [None, OLD], ids=["new", "replaced"])
def test_a_file_is_old_or_new(tmp_path: Path, before: bytes | None) -> None:
    """Whether the process died or the power failed: never a part of it, never zeros. (What is left of a temporary file
    has another name.)
    """
    path = tmp_path / "file"
    if before is not None:
        path.write_bytes(before)
    recorder = Recorder(tmp_path)
    recorder.run(lambda: (write_durably(path, NEW), fsync_folder(tmp_path)))
    for images in (recorder.killed(), recorder.power_cuts()):
        found = [tree.get("file") for tree in images]
        assert set(found) <= {before, NEW}
        assert len(set(found)) == 2
    assert {tree.get("file") for tree in recorder.last_power_cuts()} == {NEW}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("call", ["open", "fsync", "replace"])
def test_an_error_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(OLD)

    def failing(*_: Any, **__: Any) -> Any:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(Path if call == "open" else os, call, failing)
        with pytest.raises(OSError, match=os.strerror(code)):
            write_durably(path, NEW)
    assert {found.name: found.read_bytes() for found in tmp_path.iterdir()} == {"file": OLD}


_WRITER = """
import os, sys
from pathlib import Path
from kbit.host.files import write_durably
os.fsync = lambda descriptor: None
path, letter = Path(sys.argv[1]), sys.argv[2].encode()
print("ready", flush=True)
sys.stdin.readline()
for count in range(400):
    write_durably(path, letter * (1000 + count))
"""


def test_processes_that_write_one_file_at_once_take_turns(tmp_path: Path) -> None:
    """Neither publishes what the other is still writing, nor finds its own file gone."""
    path = tmp_path / "file"
    path.write_bytes(b"a")
    command = [sys.executable, "-c", _WRITER, str(path)]
    writers = [
        subprocess.Popen([*command, letter], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for letter in "ab"
    ]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    while any(writer.poll() is None for writer in writers):
        found = path.read_bytes()
        assert len(found) == 1 or len(found) >= 1000
        assert found == found[:1] * len(found)
    assert [writer.wait() for writer in writers] == [0, 0]
    assert [found.name for found in tmp_path.iterdir()] == ["file"]
    assert len(path.read_bytes()) == 1399


def test_the_recorder_loses_what_is_not_synced(tmp_path: Path) -> None:
    """Of a file that is written and renamed without a word the cuts know every way to lose it."""
    path = tmp_path / "file"
    path.write_bytes(OLD)

    def careless() -> None:
        temporary = tmp_path / "file.tmp"
        temporary.write_bytes(NEW)
        os.replace(temporary, path)

    recorder = Recorder(tmp_path)
    recorder.run(careless)
    found = {tree.get("file") for tree in recorder.power_cuts()}
    assert {OLD, b"", b"\0" * len(NEW)} <= found
    assert {tree.get("file") for tree in recorder.killed()} == {OLD, NEW}
