"""Writing prepared weights into a file (kbit.backends.cpu.prepared says what is in it)."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from io import RawIOBase
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from kbit import _native
from kbit.backends.cpu.pieces import Pieces, write_all
from kbit.backends.cpu.prepared import HEAD_BYTES, MAGIC, Opener, PreparedSource, find
from kbit.backends.cpu.prepared_nested import Sections, nested_matrices
from kbit.backends.cpu.weight import prepare_stored
from kbit.checkpoint.finite import read_array, read_stored
from kbit.checkpoint.ladder import Ladder
from kbit.checkpoint.prepared_place import ENDING, prepared_path, prepared_prefix
from kbit.checkpoint.source import StoredSource
from kbit.formats.nested import NestedFormat
from kbit.formats.stored import StoredMatrix
from kbit.formats.stored_nested import StoredNested
from kbit.host.errors import CheckpointError
from kbit.host.files import fsync_folder
from kbit.text.added_tokens import add_tokens_of_files
from kbit.text.token_table import build_table

if TYPE_CHECKING:
    from kbit._native import Context

# Room that is left on the disk beside a prepared file.
_SPARE_BYTES = 1 << 30


def make(
    source: StoredSource,
    checkpoint: Path,
    names: Mapping[str, tuple[int, ...]],
    context: Context,
    progress: Callable[[int, int], None] | None = None,
    opener: Opener | None = None,
    numbers: Collection[str] = (),
) -> PreparedSource | None:
    """Prepares a checkpoint's weights into a file, unless another process just did.

    Args:
        source: the open checkpoint.
        checkpoint: the folder or file it was opened from.
        names: the tensors the model needs, with their shapes.
        context: whose threads rearrange.
        progress: called as (tensors done, tensors in all) after each tensor.
        opener: as for PreparedSource.
        numbers: those that no kernel multiplies by, whatever their shape: kept in float32, as vectors are.

    Returns:
        None where no file can be kept: switched off, no place, or no room on the disk.

    Raises:
        CheckpointError: a tensor cannot be read, or holds NaN or infinity.
    """
    path = prepared_path(checkpoint)
    if path is None:
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Nested matrices lie in a second file, too, until all are there (`Sections`).
        needed = sum(
            info.nbytes * (2 if NestedFormat.claims(info.stored_as) else 1) for info in source.tensors.values()
        )
        if shutil.disk_usage(path.parent).free < needed + needed // 4 + _SPARE_BYTES:
            return None
        from filelock import FileLock

        with FileLock(path.with_suffix(".lock")):
            found = find(checkpoint, opener)
            if found is None:
                _remove_orphans(path.parent)
                _write(path, source, checkpoint, names, numbers, context, progress)
        with suppress(OSError):
            path.with_suffix(".lock").unlink()
        return found or find(checkpoint, opener)
    except OSError:
        return None  # a folder that cannot be written: the weights are prepared in memory, as without a cache


def _remove_orphans(folder: Path) -> None:
    """Removes what was prepared of checkpoints that are no longer there."""
    for file in folder.glob(f"*{ENDING}"):
        with suppress(OSError, CheckpointError):
            source = PreparedSource(file).path
            if not source.exists():
                for leftover in folder.glob(f"{file.stem}.*"):
                    leftover.unlink()


def _write(
    path: Path,
    source: StoredSource,
    checkpoint: Path,
    names: Mapping[str, tuple[int, ...]],
    numbers: Collection[str],
    context: Context,
    progress: Callable[[int, int], None] | None,
) -> None:
    for leftover in path.parent.glob(f"{prepared_prefix(checkpoint)}-*"):
        if leftover.suffix != ".lock":
            leftover.unlink(missing_ok=True)
    partial = path.with_suffix(".part")
    try:
        with partial.open("wb", buffering=0) as file:
            pieces = Pieces(file)
            pieces.write(b"\0" * HEAD_BYTES)
            index = _write_arrays(path.parent, file, pieces, source, names, numbers, context, progress)
            index["path"] = str(checkpoint.resolve())
            data = json.dumps(index).encode()
            begin = index["end"]
            file.seek(begin)
            write_all(file, memoryview(data))
            file.seek(0)
            head = MAGIC + begin.to_bytes(8, "little") + len(data).to_bytes(8, "little")
            write_all(file, memoryview(head + hashlib.sha256(data).digest()))
            os.fsync(file.fileno())
        os.replace(partial, path)
        fsync_folder(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _write_arrays(
    folder: Path,
    raw: RawIOBase,
    file: Pieces,
    source: StoredSource,
    names: Mapping[str, tuple[int, ...]],
    numbers: Collection[str],
    context: Context,
    progress: Callable[[int, int], None] | None,
) -> dict[str, Any]:
    matrices: dict[str, Any] = {}
    vectors: dict[str, list[int]] = {}
    nested = nested_matrices(source, names)
    plain = {name: shape for name, shape in names.items() if name not in nested}
    for done, (name, shape) in enumerate(plain.items(), start=1):
        if len(shape) == 2 and name not in numbers:
            matrix = prepare_stored(read_stored(source, name), context).matrix
            begins = [file.append(array) for array in _native.matrix_arrays(matrix)]
            matrices[name] = {**_native.describe_matrix(matrix), "begins": begins}
        else:
            vector = np.ascontiguousarray(read_array(source, name)).reshape(-1)
            begin = file.append(vector.view(np.uint8))
            vectors[name] = [begin, begin + vector.nbytes]
        if progress is not None:
            progress(done, len(names))
    files = source.sidecar_files()
    table = None
    if "tokenizer.json" in files:
        table = build_table(files["tokenizer.json"], lambda full: add_tokens_of_files(full, files, str(source.path)))
    placed = {name: _place(file, data) for name, data in files.items()}
    token_table = None if table is None else _place(file, table)
    file.flush()
    with TemporaryFile(dir=folder, buffering=0) as collected:
        sections = Sections(cast("RawIOBase", collected), file.size, nested, Ladder.of(source))
        for done, name in enumerate(nested, start=len(plain) + 1):
            stored = read_stored(source, name)
            assert isinstance(stored, StoredMatrix)
            sections.write(name, StoredNested.of(stored), context)
            if progress is not None:
                progress(done, len(names))
        sections.finish(raw)
    return {
        "config": source.config,
        "fingerprint": source.fingerprint(),
        "tensors": [[i.name, i.shape, i.stored_as, i.nbytes, str(i.file)] for i in source.tensors.values()],
        "matrices": matrices,
        "vectors": vectors,
        "nested": sections.places,
        "stretches": sections.index,
        "common": file.size,
        "end": sections.end,
        "files": placed,
        "token_table": token_table,
    }


def _place(file: Pieces, data: bytes) -> list[int]:
    begin = file.append(np.frombuffer(data, dtype=np.uint8))
    return [begin, begin + len(data)]
