"""Files that are there whole or not at all: through deaths, power cuts, full disks and read-only folders."""

from __future__ import annotations

import errno
import os
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
