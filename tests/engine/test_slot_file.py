"""Slots on disk: what was written is read, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kbit.engine.slot_file import read_slot, write_slot
from kbit.engine.slots import SavedText
from kbit.host.errors import CheckpointError

PAGE_BYTES = 96


@pytest.fixture
def saved() -> SavedText:
    rng = np.random.default_rng(0)
    return SavedText(rng.integers(0, 1 << 18, 130).tolist(), [rng.bytes(PAGE_BYTES) for _ in range(3)])


def test_what_was_written_is_read(tmp_path: Path, saved: SavedText) -> None:
    path = tmp_path / "slot"
    size = write_slot(path, saved, "model", "fp16")
    assert size == path.stat().st_size
    assert read_slot(path, "model", "fp16", PAGE_BYTES, 130) == (saved, size)
    assert [each.name for each in tmp_path.iterdir()] == ["slot"]
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_slot(tmp_path / "no" / "slot", saved, "model", "fp16")


def test_every_damage_is_seen(tmp_path: Path, saved: SavedText) -> None:
    path = tmp_path / "slot"
    write_slot(path, saved, "model", "fp16")
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(CheckpointError, match="is damaged|is no slot"):
            read_slot(path, "model", "fp16", PAGE_BYTES, 130)
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="is damaged|is no slot"):
            read_slot(path, "model", "fp16", PAGE_BYTES, 130)


@pytest.mark.parametrize(
    ("reader", "why"),
    [
        (("other", "fp16", PAGE_BYTES, 130), r"another model or by another kbit \(model, this is other\)"),
        (("model", "4", PAGE_BYTES, 130), "KV cache of kind fp16, this one is of 4: start with the same --kv-bits"),
        (("model", "fp16", PAGE_BYTES, 129), "has 130 tokens, and there is room for 129: raise --context"),
        (("model", "fp16", PAGE_BYTES + 1, 130), "pages for 130 tokens"),
        (("model", "fp16", 1, 10), "bytes are more than a slot of this server takes"),
    ],
)
def test_what_belongs_elsewhere_is_refused(
    tmp_path: Path, saved: SavedText, reader: tuple[str, str, int, int], why: str
) -> None:
    path = tmp_path / "slot"
    write_slot(path, saved, "model", "fp16")
    with pytest.raises(CheckpointError, match=why):
        read_slot(path, *reader)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_slot(tmp_path / "none", *reader)
