"""Where kbit keeps what it downloads."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """KBIT_CACHE if set, else `kbit` in the user's cache folder (XDG_CACHE_HOME, LOCALAPPDATA or ~/.cache)."""
    named = os.environ.get("KBIT_CACHE")
    if named:
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or (os.environ.get("LOCALAPPDATA") if os.name == "nt" else None)
    return (Path(base) if base else Path.home() / ".cache") / "kbit"
