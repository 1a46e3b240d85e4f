"""Small things done with whole files: read JSON, hash, write so that a file is either complete or not there."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, BinaryIO

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
    """Write a file that appears only when all of it is on disk. Raises OSError, and leaves nothing behind then.

    Processes that write one file at once take turns; the last one's stays.
    """
    temporary = path.with_name(path.name + ".tmp")
    with _opened_alone(temporary) as file:
        try:
            file.truncate(0)  # of what a killed process left
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            if os.name == "nt":  # open files cannot be renamed there
                file.close()
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def _opened_alone(path: Path) -> BinaryIO:
    """A file that no other process has opened like this, until it is closed. Raises OSError."""
    while True:
        file = path.open("ab")
        try:
            import fcntl

            fcntl.flock(file.fileno(), fcntl.LOCK_EX)
            mine, there = os.fstat(file.fileno()), path.stat()
            if (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino):
                return file
        except FileNotFoundError:  # whoever had it has renamed it since
            pass
        except (ImportError, OSError):  # a system or a file system that has no locks
            return file
        file.close()


def fsync_folder(path: Path) -> None:
    """Make a folder's entries (new names, renames) survive a power cut. Raises OSError."""
    if os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
