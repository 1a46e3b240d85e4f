"""Small things done with whole files: read JSON, hash, write so that a file is either complete or not there."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from kbit.host.errors import CheckpointError

# JSON and tokenizer files are read whole; the largest real ones are about 35 MB.
MAX_TEXT_BYTES = 256 << 20


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: the file is missing, too large, not JSON or not an object.
    """
    try:
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise CheckpointError(f"{path}: {path.stat().st_size} bytes is too large for a JSON file")
        value = json.loads(path.read_text(encoding="utf-8-sig"))  # (some editors put a mark before it)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); download it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a JSON {type(value).__name__}, an object was expected")
    return value


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def write_durably(path: Path, data: bytes) -> None:
    """Write a file that appears only when all of it is on disk. Raises OSError, and leaves nothing behind then."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def fsync_folder(path: Path) -> None:
    """Make a folder's entries (new names, renames) survive a power cut. Raises OSError."""
    if os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
