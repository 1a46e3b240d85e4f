"""Where the prepared weights of a checkpoint lie (`kbit.backends.cpu.prepared`), and removing them. Opens none."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from kbit.host.cache_folder import cache_dir
from kbit.host.errors import CheckpointError, KbitError

# Of the file, of the layout of kernels/cpu/codecs/matrix.h and of what is in its token table: with another number the
# file has another name.
VERSION = 5

ENDING = ".kbit"
_USED = ".used"
# A folder's files whose change may change the model: everything kbit reads of one.
_FOLDER_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.gguf", "*.model", "*.spm", "*.txt", "*_templates/*.jinja")
# The same of the folders of sentence-transformers' modules (`kbit.checkpoint.readers.hf_folder`).
_MODULE_PATTERNS = ("*/config.json", "*/model.safetensors", "*/pytorch_model.bin")


def prepared_folder() -> Path | None:
    """Where prepared weights are kept; None where KBIT_PREPARED says "off", or where there is no place for them."""
    named = os.environ.get("KBIT_PREPARED")
    if named == "off":
        return None
    try:
        return Path(os.path.expanduser(named)) if named else cache_dir() / "prepared"
    except KbitError:
        return None


def prepared_path(checkpoint: Path) -> Path | None:
    """Where the prepared weights of a checkpoint are, or would be; None where none are kept.

    Args:
        checkpoint: a folder or a .gguf file.
    """
    folder = prepared_folder()
    if folder is None:
        return None
    path = checkpoint.resolve()
    try:
        states = [[str(file), *_state(file)] for file in (*files_of(path), *_files_of_base(path))]
    except OSError:
        return None  # it cannot be opened either, and who opens it says so
    state = hashlib.sha256(json.dumps([VERSION, states]).encode()).hexdigest()
    return folder / f"{prepared_prefix(path)}-{state[:24]}{ENDING}"


def prepared_prefix(checkpoint: Path) -> str:
    """What the name of every file begins with that was prepared of a checkpoint, in whatever state of it."""
    return hashlib.sha256(str(checkpoint.resolve()).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _state(file: Path) -> list[int]:
    status = file.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def files_of(path: Path) -> Iterator[Path]:
    """The files that a checkpoint consists of. Of a split .gguf file all parts are there by their common name."""
    if path.is_dir():
        patterns = (*_FOLDER_PATTERNS, *(_MODULE_PATTERNS if (path / "modules.json").is_file() else ()))
        yield from sorted({file for pattern in patterns for file in path.glob(pattern)})
        return
    from kbit.checkpoint.hub import gguf_parts

    for name in gguf_parts(path.name):
        yield path.with_name(name)


def mark_used(prepared: Path) -> None:
    """Notes that prepared weights are being used. (The time is that of a file of its own: their file must not change
    while others use it, and the system changes access times as it likes.)"""
    with suppress(OSError):  # a folder of somebody else's
        prepared.with_suffix(_USED).touch()


def last_used(prepared: Path) -> float | None:
    """When prepared weights were last used, in seconds since 1970, if that is known."""
    try:
        return prepared.with_suffix(_USED).stat().st_mtime
    except OSError:
        return None


def _files_of_base(path: Path) -> Iterator[Path]:
    """Those of the model that an adapter is added to.

    Raises:
        FileNotFoundError: it is not named, or is not here: neither a file, nor pulled, nor in the hub's cache.
    """
    if not (path / "adapter_config.json").is_file():
        return
    from kbit.checkpoint.readers.lora_file import base_of, is_adapter

    if not is_adapter(path):
        return
    try:
        name = base_of(path)
    except CheckpointError as error:
        raise FileNotFoundError(str(error)) from None
    base = _of_this_machine(name)
    if base is None or base == path:
        raise FileNotFoundError(name)
    yield from files_of(base)


def _of_this_machine(name: str) -> Path | None:
    """The folder or .gguf file that a model's name stands for, if it is here; nothing is downloaded."""
    from kbit.checkpoint.hub import HUB_ID, hub_cached
    from kbit.checkpoint.pull import CATALOGUE, cached_path

    path = Path(name)
    if path.exists():
        return path.resolve()
    if name in CATALOGUE:
        path = cached_path(name)
        return path.resolve() if path.exists() else None
    try:
        return hub_cached(name) if HUB_ID.fullmatch(name) else None
    except KbitError:  # several files, none of them named: who opens it says so
        return None


def forget(checkpoint: Path) -> int:
    """Removes what was prepared of a checkpoint, in whatever state; bytes that were freed."""
    folder = prepared_folder()
    freed = 0
    for file in [] if folder is None else folder.glob(f"{prepared_prefix(checkpoint)}-*"):
        with suppress(OSError):
            size = file.stat().st_size
            file.unlink()
            freed += size
    return freed
