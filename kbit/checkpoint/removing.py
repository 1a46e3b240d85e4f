"""Removing a model: what of it kbit or the hub's library has put on the disk, and nothing else."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kbit.checkpoint.output_folder import names_in
from kbit.checkpoint.prepared_place import prepared_folder, prepared_prefix
from kbit.checkpoint.readers.hf_folder import INDEX_NAME
from kbit.checkpoint.readers.kbit_folder import MANIFEST_NAME, is_inside
from kbit.host.errors import CheckpointError, KbitError, UsageError
from kbit.host.files import read_json_object
from kbit.host.mapped_files import processes_that_map

# Weight files as `kbit.checkpoint.writer` names them; the manifest lists the others.
_SHARD = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")


@dataclass(frozen=True)
class Removal:
    """What is removed with a model.

    Attributes:
        name: as the user wrote it.
        what: what it is, in words.
        files: of the model.
        prepared: files of weights that were prepared of it.
        stays: what is in its folder besides, and stays there.
        calibrations: folders of what was measured of it.
    """

    name: str
    what: str
    files: tuple[Path, ...]
    prepared: tuple[Path, ...]
    stays: tuple[str, ...]
    _remove: Callable[[], object]
    calibrations: tuple[Path, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        measured = (file for folder in self.calibrations for file in folder.iterdir())
        return sum(file.stat().st_size for file in (*self.files, *self.prepared, *measured) if file.is_file())

    def remove(self) -> None:
        """Removes it.

        Raises:
            KbitError: a process uses it, or a file cannot be removed.
        """
        self.refuse_used()
        try:
            self._remove()
            for file in self.prepared:
                file.unlink(missing_ok=True)
            for folder in self.calibrations:
                shutil.rmtree(folder)
        except OSError as error:
            raise KbitError(f"{error.filename or self.name}: cannot be removed ({error.strerror})") from None

    def refuse_used(self) -> None:
        """
        Raises:
            KbitError: another process has it mapped.
        """
        for process, command in processes_that_map([file.resolve() for file in (*self.files, *self.prepared)]).items():
            raise KbitError(f"{self.name}: process {process} ({command[:80]}) uses it: end that first")


def removal(name: str) -> Removal:
    """What `kbit rm NAME` removes.

    Args:
        name: a catalogue model that was pulled, a hub id in the hub's cache, or a folder kbit wrote.

    Raises:
        UsageError: there is no such model, or neither kbit nor the hub's library made it.
        CheckpointError: a folder of kbit's whose manifest cannot be read.
    """
    from kbit.checkpoint.hub import HUB_ID
    from kbit.checkpoint.pull import CATALOGUE, cached_path

    path = Path(os.path.expanduser(name))
    if not name.strip():
        raise UsageError("the model's name is empty: kbit list shows names")
    if os.path.lexists(path):
        return _of_folder(name, path)
    if name in CATALOGUE:
        file = cached_path(name)
        if not file.is_file():
            raise UsageError(f"{name}: is not on this machine: there is nothing to remove")
        return Removal(name, "a model of kbit's cache", (file,), _prepared(file), (), lambda: _unlink(file))
    if HUB_ID.fullmatch(name):
        return _of_hub(name)
    raise UsageError(f"{name}: no such folder, and no model of the caches: kbit list shows names")


def _of_hub(name: str) -> Removal:
    from kbit.checkpoint.hub import cache_of

    repository, _, file = name.partition(":")
    found = cache_of(repository)
    if found is None:
        raise UsageError(f"{name}: no such folder, and the hub's cache does not hold it: kbit list shows names")
    if file:
        raise UsageError(f"{name}: of the hub's cache whole repositories are removed: kbit rm {repository}")
    files, remove = found
    return Removal(name, "a repository of the hub's cache, with all its files", tuple(files), (), (), remove)


def _of_folder(name: str, path: Path) -> Removal:
    if path.is_symlink():
        raise UsageError(f"{name}: is a symbolic link: name the folder that it leads to, {path.resolve()}")
    if not path.is_dir() or not (path / MANIFEST_NAME).is_file():
        raise UsageError(
            f"{name}: kbit removes what it has written itself, and there is no {MANIFEST_NAME} here: remove it by "
            f"other means; kbit info {name} --forget removes what kbit keeps of it"
        )
    manifest = read_json_object(path / MANIFEST_NAME)
    listed = manifest.get("files")
    if not isinstance(listed, dict) or not all(is_inside(file) for file in listed):
        raise CheckpointError(f"{path / MANIFEST_NAME}: does not list the files of the folder: remove it by hand")
    names = {*listed, MANIFEST_NAME, INDEX_NAME, *filter(_SHARD.fullmatch, names_in(path))}
    below = sorted(path / file for file in names)
    files = [file for file in below if file.is_file() and not file.parent.is_symlink()]
    stays = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if not file.is_dir())
    stays = [file for file in stays if path / file not in files]
    # The manifest goes last: what is left of a folder when this is interrupted can be removed by the same command.
    files.sort(key=lambda file: file.name == MANIFEST_NAME)

    def remove() -> None:
        for file in files:
            file.unlink(missing_ok=True)
        for folder in [*{file.parent for file in files if file.parent != path}, path]:
            with suppress(OSError):  # something else is in it
                folder.rmdir()

    return Removal(name, "a folder kbit wrote", tuple(files), _prepared(path), tuple(stays), remove)


def _unlink(file: Path) -> None:
    file.unlink()
    with suppress(OSError):
        file.parent.rmdir()


def _prepared(checkpoint: Path) -> tuple[Path, ...]:
    folder = prepared_folder()
    return () if folder is None else tuple(sorted(folder.glob(f"{prepared_prefix(checkpoint)}-*")))
