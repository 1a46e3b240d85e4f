"""Commands in this process."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from typing import Any, TypeAlias

import pytest

Run: TypeAlias = Callable[..., tuple[int, str, str]]


def in_process(arguments: list[str], monkeypatch: pytest.MonkeyPatch, stdin: bytes = b"") -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the command without the cost of a process."""
    from kbit.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "argv", ["kbit", *arguments])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with pytest.raises(SystemExit) as exit_:
        main()
    return int(exit_.value.code or 0), out.getvalue(), err.getvalue()


def report(kbit: Run, *arguments: str, stdin: bytes = b"") -> Any:
    """What a command says with --json: one object on one line."""
    code, out, err = kbit(*arguments, "--json", stdin=stdin)
    assert (code, out.count("\n")) == (0, 1), err
    return json.loads(out)
