"""Where a conversion writes: what is in the way is never lost, and disks fill up without harm."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conversion_cases import Stopped, Usage, assert_not_loadable, files_of, quantize, rerun, stop_after
from filelock import FileLock

from kbit.checkpoint.readers.kbit_folder import KbitFolder
from kbit.checkpoint.writer import CheckpointWriter
from kbit.host.errors import CheckpointError, KbitError, UsageError

# --- the output folder -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_that_is_in_the_way_is_never_touched(tmp_path: Path, small_model: Path, overwrite: bool) -> None:
    file, foreign, link = tmp_path / "file", tmp_path / "foreign", tmp_path / "link"
    file.write_text("precious")
    foreign.mkdir()
    (foreign / "config.json").write_text("{}")
    (foreign / "model.safetensors").write_text("weights of something else")
    link.symlink_to(tmp_path / "elsewhere")
    before = files_of(tmp_path)
    for out, message in ((file, "is a file"), (foreign, "exists and holds other files"), (link, "is a symbolic link")):
        with pytest.raises(UsageError, match=f"{out.name}: {message}"):
            rerun(small_model, out, overwrite=overwrite)
    for out in (Path("/"), Path("."), Path(".."), tmp_path / ".."):
        with pytest.raises(UsageError, match="not a name for a new folder"):
            rerun(small_model, out, overwrite=overwrite)
    assert files_of(tmp_path) == before


def test_an_empty_folder_is_used(tmp_path: Path, small_model: Path, undisturbed: dict[str, bytes]) -> None:
    (tmp_path / "out").mkdir()
    rerun(small_model, tmp_path / "out")
    assert files_of(tmp_path / "out") == undisturbed


def test_folders_above_are_created(tmp_path: Path, small_model: Path, undisturbed: dict[str, bytes]) -> None:
    rerun(small_model, tmp_path / "a" / "b" / "out")
    assert files_of(tmp_path / "a") == {f"b/out/{name}": data for name, data in undisturbed.items()}


def test_a_finished_model_is_kept_unless_force(
    tmp_path: Path, small_model: Path, undisturbed: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    quantize(small_model, out, "nf4-b64")
    before = files_of(out)
    with pytest.raises(UsageError, match="out: already holds a finished model; .* --force"):
        rerun(small_model, out)
    assert files_of(out) == before
    rerun(small_model, out, overwrite=True)
    assert files_of(out) == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failing_replacement_leaves_the_old_model(tmp_path: Path, small_model: Path) -> None:
    out = tmp_path / "out"
    quantize(small_model, out, "nf4-b64")
    before = files_of(out)
    stop_after(small_model, out, 11, overwrite=True)
    assert files_of(out) == before
    KbitFolder(out).close()


def test_the_same_conversion_twice_does_nothing(
    tmp_path: Path, small_model: Path, undisturbed: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    first = rerun(small_model, out)
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    second = rerun(small_model, out)
    assert (second.written, second.resumed) == (0, 11)
    assert second.nbytes == first.nbytes
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == times
    third = rerun(small_model, out, overwrite=True)  # --force: anew
    assert third.written == 11
    assert files_of(out) == undisturbed


def test_a_finished_model_that_lost_a_file_is_not_taken_for_finished(tmp_path: Path, small_model: Path) -> None:
    out = tmp_path / "out"
    rerun(small_model, out)
    shard = sorted(out.glob("*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"{shard.name}: shard is missing; .* anew with --force"):
        rerun(small_model, out)
    rerun(small_model, out, overwrite=True)
    KbitFolder(out).close()


def test_a_folder_that_appears_meanwhile_is_not_replaced(tmp_path: Path, small_model: Path) -> None:
    out = tmp_path / "out"

    def on_tensor(tensor: Any) -> None:
        out.mkdir(exist_ok=True)
        (out / "thesis.tex").write_text("years of work")

    with pytest.raises(UsageError, match="out: exists and holds other files"):
        rerun(small_model, out, on_tensor=on_tensor, overwrite=True)
    assert files_of(out) == {"thesis.tex": b"years of work"}
    shutil.rmtree(out)
    assert rerun(small_model, out).resumed == 11  # nothing was lost


# --- full disks, permissions -----------------------------------------------------------------------------------------


def test_a_disk_that_is_too_small_is_refused_early(
    tmp_path: Path, small_model: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9 - 1000, 1000))
        with pytest.raises(KbitError, match=r"out: needs .* GB, but only 0\.00 GB are free; make room"):
            rerun(small_model, tmp_path / "out")
    assert_not_loadable(tmp_path / "out.partial")
    rerun(small_model, tmp_path / "out")
    assert files_of(tmp_path / "out") == undisturbed


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT], ids=["ENOSPC", "EDQUOT"])
@pytest.mark.parametrize("at", range(0, 18, 2))
def test_a_disk_that_fills_up(
    tmp_path: Path,
    small_model: Path,
    undisturbed: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    at: int,
    code: int,
) -> None:
    """The Nth sync or file the writer opens fails: one clear error, and a rerun goes on."""
    calls = 0
    real: dict[str, Callable[..., Any]] = {"fsync": os.fsync, "open": Path.open}

    def failing(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            if name == "fsync" or "partial" in str(args[0]):
                calls += 1
                if calls > at:
                    raise OSError(code, os.strerror(code))
            return real[name](*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing("fsync"))
        patch.setattr(Path, "open", failing("open"))
        with pytest.raises(
            KbitError, match=r"out\.partial: the disk is full; make room and run the same command again"
        ):
            rerun(small_model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert_not_loadable(tmp_path / "out.partial")
    rerun(small_model, tmp_path / "out")
    assert files_of(tmp_path / "out") == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_errors_on_closing_hide_nothing(tmp_path: Path) -> None:
    """What could not be flushed when the disk filled up cannot be flushed on closing either."""

    class Full:
        def close(self) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def convert_something() -> None:
        with CheckpointWriter(tmp_path / "out", [], "plan") as writer:
            writer._files["full"] = Full()  # type: ignore[assignment]
            raise Stopped

    for _ in range(2):  # the lock is free again
        with pytest.raises(Stopped):
            convert_something()


@pytest.fixture(params=[16, 24, 36, 40, 44], ids=lambda size: f"{size}k")
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file system of a few kilobytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={request.param}k", "tmpfs", str(disk)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, timeout=300)
    except OSError as error:
        pytest.skip(f"no mount: {error}")
    if done.returncode:
        pytest.skip(f"mounting a small file system is not allowed here: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True, timeout=300)


def test_a_disk_that_is_really_full(
    small_disk: Path, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writes that fail where a real disk fails them: in the middle, in buffers flushed late, on closing."""
    out = small_disk / "out"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 0, 10**9))  # as if it filled up later
    for _ in range(2):
        with pytest.raises(
            KbitError, match=r"out\.partial: the disk is full; make room and run the same command again"
        ):
            quantize(tiny_model, out)
        assert not out.exists()
        assert_not_loadable(small_disk / "out.partial")
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True, timeout=300)
    quantize(tiny_model, out)
    quantize(tiny_model, tmp_path / "undisturbed")
    assert files_of(out) == files_of(tmp_path / "undisturbed")


def test_other_write_errors_name_the_folder(tmp_path: Path, small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(KbitError, match=r"out\.partial: cannot be written \(Input/output error\)"):
        rerun(small_model, tmp_path / "out")


@pytest.mark.parametrize("at", range(1, 18, 4))
def test_a_disk_that_becomes_read_only(
    tmp_path: Path, small_model: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """As systems mount a file system again after an error: from the Nth file, sync or rename on nothing can be written."""
    calls = 0
    real: dict[str, Callable[..., Any]] = {"fsync": os.fsync, "open": Path.open, "replace": os.replace}

    def failing(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += name != "open" or "partial" in str(args[0])
            if calls > at:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))
            return real[name](*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for place, name in ((os, "fsync"), (Path, "open"), (os, "replace")):
            patch.setattr(place, name, failing(name))
        with pytest.raises(KbitError, match=r"cannot be written \(Read-only file system\)"):
            rerun(small_model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    rerun(small_model, tmp_path / "out")
    assert files_of(tmp_path / "out") == undisturbed


def test_an_output_below_a_file(tmp_path: Path, small_model: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(KbitError, match="file.*: cannot be written"):
        rerun(small_model, tmp_path / "file" / "out")


def test_a_name_that_is_too_long(tmp_path: Path, small_model: Path) -> None:
    with pytest.raises(KbitError, match=r"cannot be written \(File name too long\)"):
        rerun(small_model, tmp_path / ("x" * 250))  # .partial makes it 258


def test_a_folder_without_permission(tmp_path: Path, small_model: Path) -> None:
    folder = tmp_path / "readonly"
    folder.mkdir()
    folder.chmod(0o500)
    if os.access(folder, os.W_OK):
        pytest.skip("permissions do not bind this user")
    with pytest.raises(KbitError, match="cannot be written .Permission denied"):
        rerun(small_model, folder / "out")


def test_a_lock_that_cannot_be_made(tmp_path: Path, small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(self: FileLock, *args: Any, **kwargs: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path / "out.partial.lock"))

    monkeypatch.setattr(FileLock, "acquire", denied)
    with pytest.raises(KbitError, match=r"out\.partial\.lock: cannot be written \(Permission denied\)"):
        rerun(small_model, tmp_path / "out")
