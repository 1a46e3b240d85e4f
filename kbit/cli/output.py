"""What the commands share in talking to people and to programs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import typer

from kbit.host.json_values import finite
from kbit.host.quantities import size as size


def print_json(value: Mapping[str, Any]) -> None:
    """One JSON object on stdout: the whole output of a command under --json. NaN and infinity become null."""
    # Escaped: stdout's encoding may lack a character, and hostile files hold lone surrogates.
    typer.echo(json.dumps(finite(value), allow_nan=False))


def printable(value: object) -> str:
    """A value from a file as text that cannot disturb a terminal."""
    return "".join(char if char.isprintable() else "?" for char in str(value))
