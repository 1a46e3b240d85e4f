"""Errors a user can act on.

Every error kbit raises on purpose is one line that names the thing (file, tensor, flag, value) and says what
to do about it. The command line prints that line and exits with the error's `exit_code`; anything else that
escapes is a bug and shows a traceback with `--debug`.
"""

from __future__ import annotations


class KbitError(Exception):
    """Something failed: bad data, a missing file, a full disk. Exit code 1."""

    exit_code = 1


class UsageError(KbitError):
    """The request itself is wrong: a bad flag value, an impossible combination, a bad prompt. Exit code 2."""

    exit_code = 2


class CheckpointError(KbitError):
    """A checkpoint is truncated, corrupt, hostile, incomplete or of a kind kbit does not read."""


class UnsupportedError(KbitError):
    """The input is well formed, but kbit does not implement what it asks for."""


def one_line(value: object, limit: int = 200) -> str:
    """A value or another library's error as part of a one-line message: white space collapsed, cut to `limit`
    characters; an error without text is named by its type.
    """
    text = " ".join(str(value).split()) or (type(value).__name__ if isinstance(value, BaseException) else "")
    return text if len(text) <= limit else text[: limit - 3] + "..."
