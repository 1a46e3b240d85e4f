"""What a person types, or a pipe brings, in `kbit chat`: messages of one line or several, and a history of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kbit.cli.options import MAX_PROMPT_BYTES
from kbit.host.errors import KbitError, UsageError
from kbit.host.utf8 import decode

_QUOTES = '"""'
_HISTORY_LINES = 1000


def next_message(terminal: bool, shared: bool, note: Callable[[str], None]) -> str | None:
    """The next message; None at the end of input.

    Args:
        terminal: a person types it.
        shared: several processes wait for it, and Ctrl-C ends them all.
        note: says something to the person.

    Raises:
        UsageError: a line from a pipe that is too long, or no UTF-8.
    """
    if not terminal:
        return _line_of_pipe()
    while True:
        try:
            return _typed(input)
        except EOFError:
            note("")
            return None
        except KeyboardInterrupt:
            if shared:
                raise
            note("\n(Ctrl-D or /exit to leave)")


def _typed(read: Callable[[str], str]) -> str:
    """A message of a line, of lines that all but the last end in a backslash, or of lines between triple quotes.

    Args:
        read: reads a line, showing a prompt.
    """
    line = read("> ")
    if line.lstrip().startswith(_QUOTES):
        lines = [line.lstrip().removeprefix(_QUOTES)]
        while not lines[-1].rstrip().endswith(_QUOTES):
            lines.append(read(". "))
        lines[-1] = lines[-1].rstrip().removesuffix(_QUOTES)
        return "\n".join(lines).strip("\n")
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(read(". "))
    return "\n".join(lines)


def _line_of_pipe() -> str | None:
    line = sys.stdin.buffer.readline(MAX_PROMPT_BYTES + 1)
    if len(line) > MAX_PROMPT_BYTES:
        raise UsageError(f"a message from standard input is longer than {MAX_PROMPT_BYTES >> 20} MiB: shorten it")
    return decode(line, "a message from standard input") or None


def history_file() -> Path | None:
    """Where what is typed is kept: `chat_history` in kbit's cache, or what KBIT_HISTORY names; None where that says
    "off", or where there is no place."""
    named = os.environ.get("KBIT_HISTORY")
    if named == "off":
        return None
    if named:
        return Path(os.path.expanduser(named))
    from kbit.host.cache_folder import cache_dir

    try:
        return cache_dir() / "chat_history"
    except KbitError:
        return None


@contextmanager
def line_editing() -> Iterator[None]:
    """Gives `input` line editing, with the lines of earlier chats; those of this one are kept when it ends.

    Windows has its own editing, and no such history.
    """
    try:
        import readline
    except ImportError:
        yield
        return
    file = history_file()
    readline.set_history_length(_HISTORY_LINES)
    if file is not None:
        with suppress(OSError):
            readline.read_history_file(file)
    before = readline.get_current_history_length()
    try:
        yield
    finally:
        new = readline.get_current_history_length() - before
        if file is not None and new > 0:
            with suppress(OSError):  # nothing depends on it
                file.parent.mkdir(parents=True, exist_ok=True)
                file.touch(mode=0o600)  # what people say to a model is theirs
                readline.append_history_file(new, file)
