"""The models on this machine: pulled ones, those in the hub's cache, and those in a folder. Opens none of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kbit.checkpoint.prepared_place import files_of, last_used, prepared_path
from kbit.host.cache_folder import cache_dir
from kbit.host.errors import CheckpointError, KbitError, UsageError

Place = Literal["folder", "cache", "hub"]


@dataclass(frozen=True)
class LocalModel:
    """A model on this machine.

    Attributes:
        name: what commands take for it.
        path: its folder or .gguf file.
        place: where it was found: in a folder, in kbit's cache, or in the hub's.
    """

    name: str
    path: Path
    place: Place

    @property
    def nbytes(self) -> int:
        """Bytes of the files that kbit reads of it."""
        return sum(file.stat().st_size for file in files_of(self.path) if file.is_file())

    @property
    def prepared(self) -> Path | None:
        """The file of its prepared weights, if there is one."""
        path = prepared_path(self.path)
        return path if path is not None and path.is_file() else None

    @property
    def last_used(self) -> float | None:
        """When the CPU engine last loaded it, in seconds since 1970; None: never, or it keeps no prepared weights."""
        prepared = self.prepared
        return None if prepared is None else last_used(prepared)


def local_models(folders: list[Path]) -> Iterator[LocalModel]:
    """All models of the caches, and of some folders.

    Args:
        folders: looked at, and one level below.

    Raises:
        UsageError: one is no folder.
    """
    for folder in folders:
        if not folder.is_dir():
            raise UsageError(f"{folder}: no such folder: name one that holds models")
        yield from _in_folder(folder)
    yield from _in_cache()
    yield from _in_hub()


def widths_folder() -> Path:
    """Where `kbit serve MODEL:3` keeps what it has rounded.

    Raises:
        KbitError: there is no cache folder.
    """
    return cache_dir() / "widths"


def _in_folder(folder: Path) -> Iterator[LocalModel]:
    from kbit.checkpoint.hub import gguf_models, holds_safetensors

    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read ({error.strerror})") from None
    if holds_safetensors(folder):
        yield LocalModel(str(folder), folder, "folder")
    else:
        for name in gguf_models([entry.name for entry in entries if entry.suffix == ".gguf"]):
            yield LocalModel(str(folder / name), folder / name, "folder")
    for entry in entries:
        if _is_model(entry):
            yield LocalModel(str(entry), entry, "folder")


def _is_model(folder: Path) -> bool:
    """Whether a folder holds the files of one finished model."""
    from kbit.checkpoint.hub import holds_safetensors

    try:
        if folder.suffix == ".partial" or folder.name.startswith(".") or not folder.is_dir():
            return False
        return holds_safetensors(folder) or sum(1 for _ in folder.glob("*.gguf")) == 1
    except OSError:
        return False


def _in_cache() -> Iterator[LocalModel]:
    from kbit.checkpoint.pull import CATALOGUE, cached_path

    try:
        for name in CATALOGUE:
            if cached_path(name).is_file():
                yield LocalModel(name, cached_path(name), "cache")
        widths = widths_folder()
    except KbitError:  # there is no home folder, so no cache
        return
    for folder in sorted(widths.glob("*")):
        if _is_model(folder):
            yield LocalModel(str(folder), folder, "cache")


def _in_hub() -> Iterator[LocalModel]:
    from kbit.checkpoint.hub import cached_models

    for name, path in cached_models():
        yield LocalModel(name, path, "hub")
