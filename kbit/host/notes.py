"""What the user should know, though it stops nothing: a choice between two files, or something that is left out.

A note is a Python warning of its own category: a program that uses kbit filters it as it filters others, and the
command line prints it as one line on standard error (`kbit.cli.main`).
"""

from __future__ import annotations

import warnings


class KbitNote(UserWarning):
    """The category of kbit's notes."""


def note(message: str) -> None:
    """Tell the user something.

    Args:
        message: one line that names the file and the choice.
    """
    warnings.warn(message, KbitNote, stacklevel=3)
