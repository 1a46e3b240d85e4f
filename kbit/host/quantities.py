"""Sizes and times as people write and read them."""

from __future__ import annotations

import re

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
_TIME = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?")


def parse_size(text: str) -> int | None:
    """Bytes of a size such as "80MB"; None where it is none."""
    text = text.strip().upper()
    unit = next((unit for unit in _UNITS if text.endswith(unit)), None)
    try:
        found = float(text.removesuffix(unit or "")) * _UNITS.get(unit or "", 1)
    except ValueError:
        return None
    return int(found) if 0 < found < 1e15 else None


def parse_duration(text: str) -> float | None:
    """Seconds of a time such as "90s", "10m" or "1h30m"; None where it is none."""
    found = _TIME.fullmatch(text.strip().lower())
    if found is None:
        return None
    hours, minutes, seconds = (float(part or 0) for part in found.groups())
    return 3600 * hours + 60 * minutes + seconds or None


def duration(seconds: float) -> str:
    """A time for people: "45 s", "3.2 min", "1.5 h"."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.{1 if seconds < 600 else 0}f} min" if seconds < 5970 else f"{seconds / 3600:.1f} h"


def ago(seconds: float) -> str:
    """How long ago something was, for people: "now" (also where the clock was put back since), "5 minutes ago"."""
    for unit, length in (("year", 31_557_600), ("month", 2_629_800), ("day", 86400), ("hour", 3600), ("minute", 60)):
        count = int(max(0.0, seconds) // length)
        if count:
            return f"{count} {unit}{'s' if count > 1 else ''} ago"
    return "now"


def size(nbytes: float) -> str:
    """Bytes for people: "512 B", "98.4 MB", "4.07 GB" (decimal units, three digits)."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(nbytes) < 999.5 or unit == "TB":
            digits = 0 if unit == "B" else max(0, 2 - len(str(int(abs(nbytes)))) + 1)
            return f"{nbytes:.{digits}f} {unit}"
        nbytes /= 1000
    raise AssertionError
