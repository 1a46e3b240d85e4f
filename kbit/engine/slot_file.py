"""A slot on disk: a line that says what it is, a line of JSON, the bytes of pages, and the sha256 of all before it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from kbit.engine.slots import SavedText
from kbit.graph.pages import pages_for
from kbit.host.errors import CheckpointError
from kbit.host.files import write_durably

_MAGIC = b"kbit slot 1\n"
_DIGEST = 32


def write_slot(path: Path, saved: SavedText, model: str, kind: str) -> int:
    """Writes a slot. A file of that name is replaced when all of the new one is on disk.

    Args:
        path: the file.
        saved: what is in it.
        model: what keys and values depend on beside the tokens and their kind.
        kind: of the KV cache.

    Returns:
        Bytes of the file.

    Raises:
        CheckpointError: it cannot be written.
    """
    header = json.dumps({"model": model, "kv": kind, "tokens": saved.ids}).encode()
    data = b"".join([_MAGIC, header, b"\n", *saved.pages])
    try:
        write_durably(path, data + hashlib.sha256(data).digest())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror})") from None
    return len(data) + _DIGEST


def read_slot(path: Path, model: str, kind: str, page_bytes: int, most_tokens: int) -> tuple[SavedText, int]:
    """(a slot as `write_slot` wrote it, bytes of the file).

    Args:
        path: the file.
        model, kind: as for `write_slot`, of who reads it.
        page_bytes: of a page there.
        most_tokens: that there is room for.

    Raises:
        CheckpointError: it cannot be read, is damaged, or belongs to another model or cache.
    """
    limit = pages_for(most_tokens) * page_bytes + (most_tokens + 64) * 16
    try:
        if path.stat().st_size > limit:
            raise CheckpointError(f"{path}: {path.stat().st_size} bytes are more than a slot of this server takes")
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}): save the slot first") from None
    if not data.startswith(_MAGIC):
        raise CheckpointError(f"{path}: is no slot that kbit saved: save it again")
    body = memoryview(data)[:-_DIGEST]
    if len(data) < len(_MAGIC) + _DIGEST or hashlib.sha256(body).digest() != data[-_DIGEST:]:
        raise CheckpointError(f"{path}: is damaged (its checksum differs): save the slot again")
    end = data.index(b"\n", len(_MAGIC))  # (that it is there, and JSON before it, is what the checksum says)
    header: dict[str, Any] = json.loads(data[len(_MAGIC) : end])
    if header["kv"] != kind:
        raise CheckpointError(
            f"{path}: was saved from a KV cache of kind {header['kv']}, this one is of {kind}: start with the same "
            "--kv-bits, or save the slot again"
        )
    if header["model"] != model:
        raise CheckpointError(
            f"{path}: was saved with another model or by another kbit ({header['model']}, this is {model}): "
            "save the slot again"
        )
    ids = header["tokens"]
    if not 1 <= len(ids) <= most_tokens:
        raise CheckpointError(f"{path}: has {len(ids)} tokens, and there is room for {most_tokens}: raise --context")
    pages = [bytes(body[at : at + page_bytes]) for at in range(end + 1, len(body), page_bytes)]
    if len(body) - end - 1 != pages_for(len(ids)) * page_bytes:
        raise CheckpointError(f"{path}: has {len(pages)} pages for {len(ids)} tokens: save the slot again")
    return SavedText(ids, pages), len(data)
