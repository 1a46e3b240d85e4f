"""Where kbit keeps what it downloads."""

from __future__ import annotations

import os
from pathlib import Path

from kbit.host.errors import KbitError


def cache_dir() -> Path:
    """KBIT_CACHE if set, else `kbit` in the user's cache folder (XDG_CACHE_HOME, LOCALAPPDATA or ~/.cache).

    Raises:
        KbitError: none of them is known.
    """
    named = os.environ.get("KBIT_CACHE")
    if named:
        return Path(os.path.expanduser(named))  # leaves what it cannot expand, where Path's raises
    base = os.environ.get("XDG_CACHE_HOME") or (os.environ.get("LOCALAPPDATA") if os.name == "nt" else None)
    if base:
        return Path(base) / "kbit"
    try:
        return Path.home() / ".cache" / "kbit"
    except RuntimeError:  # a user id without a home, as in some containers
        raise KbitError("there is no home folder to keep models in: set KBIT_CACHE to a folder") from None
