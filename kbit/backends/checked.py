"""Whether this machine's GPU was checked with what is installed, and what --device auto makes of that.

`kbit check-gpu` writes a file into the cache for the GPU, its driver, and the versions of torch, triton, kbit and its
kernels; with any other of them the check counts no more. Asking imports no torch and touches no GPU.
"""

from __future__ import annotations

import json
from functools import lru_cache
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from kbit import __version__
from kbit.backends.gpu import driver_version, gpu_summary, kernels_hash
from kbit.host.cache_folder import cache_dir
from kbit.host.errors import KbitError
from kbit.host.files import write_durably
from kbit.host.notes import note

MAX_BYTES = 16 << 20


def machine() -> dict[str, str] | None:
    """What a check is valid for, or None where there is no GPU, no Triton or no torch."""
    gpu = gpu_summary()
    if gpu is None:
        return None
    try:
        versions = {name: version(name) for name in ("torch", "triton")}
    except PackageNotFoundError:
        return None
    return {"gpu": gpu, "driver": driver_version(), **versions, "kbit": __version__, "kernels": kernels_hash()}


def record_path(of: dict[str, str]) -> Path:
    """The file of a machine's check. Raises KbitError where no cache folder is known."""
    digest = sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()
    return cache_dir() / "checked" / f"{digest[:24]}.json"


def passed(of: dict[str, str]) -> dict[str, Any] | None:
    """The record of a check that this machine passed, else None. A file that is anything else counts as none."""
    try:
        with record_path(of).open("rb") as file:
            found = json.loads(file.read(MAX_BYTES).decode())
    except (OSError, ValueError, RecursionError, KbitError):
        return None
    right = isinstance(found, dict) and found.get("machine") == of and found.get("passed") is True
    return found if right else None


def remember(of: dict[str, str], found: dict[str, Any]) -> Path:
    """Keeps what a check found, and returns where.

    Raises:
        KbitError: no cache folder is known.
        OSError: it cannot be written.
    """
    path = record_path(of)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, json.dumps({"machine": of, **found}, indent=1, default=str).encode())
    return path


@lru_cache(maxsize=1)
def auto_device() -> str:
    """What --device auto takes: "cuda" where this machine's GPU passed `kbit check-gpu`; else "cpu", and where there is
    a GPU a note that says why."""
    of = machine()
    if of is None:
        return "cpu"
    if passed(of):
        return "cuda"
    note(
        f"this runs on the CPU: the GPU ({of['gpu']}) has not passed kbit check-gpu with torch {of['torch']} and "
        f"triton {of['triton']}; run it once, or use --device cuda (or --device cpu, which says nothing)"
    )
    return "cpu"
