"""Bytes from outside as text."""

from __future__ import annotations

from kbit.host.errors import UsageError

_UTF_16 = (b"\xff\xfe", b"\xfe\xff")  # byte order marks


def decode(data: bytes, what: str, encoding: str = "utf-8") -> str:
    """UTF-8 as text.

    Args:
        data: the bytes.
        what: whose they are, for errors.
        encoding: "utf-8", or "utf-8-sig" to drop a byte order mark.

    Raises:
        UsageError: they are not UTF-8; the line says how to convert them.
    """
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        other = "UTF-16" if data.startswith(_UTF_16) else "WINDOWS-1252"
        raise UsageError(
            f"{what} is not UTF-8 at byte {error.start}: convert it (if it is {other}: iconv -f {other} -t UTF-8)"
        ) from None
