"""docs/families.md names every family that there is, and every architecture of GGUF files."""

from __future__ import annotations

from pathlib import Path

from kbit.checkpoint.gguf.architectures import ARCHITECTURES
from kbit.checkpoint.gguf.encoders import ENCODERS
from kbit.checkpoint.gguf.t5 import T5
from kbit.models.families import FAMILIES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "families.md"


def test_every_family_has_its_place() -> None:
    page = PAGE.read_text()
    for name in (*FAMILIES, *ARCHITECTURES, *ENCODERS, T5.name):
        assert f"`{name}`" in page, name
