"""What a server does besides answering."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from serve_cases import PATIENCE, serving

from kbit.serve import app


def test_free_memory_is_given_back_again_and_again(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By another thread than the one that answers."""
    threads, thrice = [], threading.Event()

    def give_back() -> bool:
        threads.append(threading.get_ident())
        if len(threads) == 3:
            thrice.set()
        return True

    monkeypatch.setattr(app, "TIDY_SECONDS", 0.01)
    monkeypatch.setattr(app, "give_back_free_memory", give_back)
    with serving(("tiny", tiny_model)) as client:
        assert thrice.wait(PATIENCE)
        loop = client.portal.call(threading.get_ident) if client.portal is not None else None
        assert loop is not None
        assert loop not in threads
    count = len(threads)
    threading.Event().wait(0.1)
    assert len(threads) <= count + 1  # one may have been under way
