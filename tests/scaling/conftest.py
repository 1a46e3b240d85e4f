"""What sweeps run on: a text, and a cache folder of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
from scale_cases import write_text


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KBIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def text(tmp_path: Path, own_cache: Path) -> Path:
    return write_text(tmp_path)
