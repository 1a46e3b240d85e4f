"""Commands in this process."""

from __future__ import annotations

import pytest
from command_cases import Run, in_process


@pytest.fixture
def kbit(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command: its exit code, and what it prints."""

    def run(*arguments: str, stdin: bytes = b"") -> tuple[int, str, str]:
        return in_process(list(arguments), monkeypatch, stdin)

    return run
