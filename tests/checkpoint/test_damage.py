"""Every byte range of small valid models damaged in turn, and every truncation: refused, or harmless, never unnoticed.

kbit's folders have checksums: all damage is found, and named. Safetensors and GGUF files have none: what their header
says is checked, and damage to the data of one tensor changes that tensor and no other.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conversion_cases import quantize
from gguf_model_cases import Model

from kbit.checkpoint.gguf.header import read_header
from kbit.checkpoint.readers.safetensors_file import SafetensorsFile
from kbit.checkpoint.resolve import open_model
from kbit.checkpoint.source import StoredSource
from kbit.formats.stored import StoredMatrix
from kbit.host.errors import CheckpointError, KbitError

HEADER_STEP, DATA_STEP = 24, 300


def contents(path: Path) -> dict[str, bytes]:
    """What a model's tensors and configuration are."""
    with open_model(str(path)) as source:
        assert isinstance(source, StoredSource)
        found = {"": json.dumps(source.config, sort_keys=True).encode()}
        for name in source.tensors:
            stored = source.read_stored(name)
            if isinstance(stored, StoredMatrix):
                parts = [stored.codebook, *(stored.parts[key] for key in sorted(stored.parts))]
            else:
                parts = [stored.values]
            found[name] = b"".join(np.ascontiguousarray(part).tobytes() for part in parts)
        return found


def damaged(path: Path, header: int) -> Iterator[str]:
    """Changes ranges of a file in turn, some bits of each, and then the next; what was changed, in words."""
    whole = path.read_bytes()
    at = 0
    while at < len(whole):
        step = HEADER_STEP if at < header else DATA_STEP
        content = bytearray(whole)
        for place in range(at, min(at + step, len(whole)), 5):
            content[place] ^= 1 << (place % 8)
        path.write_bytes(content)
        os.utime(path, ns=(at, at))  # another state of the file, which nobody has verified
        yield f"bytes {at} to {at + step} of {path.name}"
        at += step
    path.write_bytes(whole)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KBIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "fsync", int)


@pytest.mark.usefixtures("own_cache")
def test_of_parts_that_are_alike_each_is_verified(tmp_path: Path, tiny_model: Path) -> None:
    """The signs of all trellises of one width are the same bytes, and have one checksum."""
    folder = tmp_path / "out"
    quantize(tiny_model, folder, "trellis3-l8")
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    stored = json.loads(whole[8:length])
    bytes_of: dict[bytes, dict[str, int]] = {}  # by what they are, where each part of these begins
    for name, entry in stored.items():
        if name.endswith(".signs"):
            begin, end = (length + at for at in entry["data_offsets"])
            bytes_of.setdefault(whole[begin:end], {})[name] = begin
    alike = max(bytes_of.values(), key=len)
    assert len(alike) > 1
    for name in (min(alike), max(alike)):
        content = bytearray(whole)
        content[alike[name]] ^= 1
        path.write_bytes(content)
        with open_model(str(folder)) as source, pytest.raises(CheckpointError, match=f"{name} is damaged"):
            source.verify()
        with pytest.raises(CheckpointError, match=f"{name} is damaged"):
            contents(folder)


@pytest.mark.usefixtures("own_cache")
def test_all_damage_to_a_folder_of_ours_is_found(tmp_path: Path, small_model: Path) -> None:
    """In every file but the tokenizer's, which is read later: refused, or nothing differs (white space of the header)."""
    folder = tmp_path / "out"
    quantize(small_model, folder, "nf4-b64-dq")
    expected = contents(folder)
    refused = 0
    for name in ("model.safetensors", "config.json", "kbit-manifest.json"):
        path = folder / name
        length = 8 + int.from_bytes(path.read_bytes()[:8], "little") if path.suffix == ".safetensors" else 0
        for where in damaged(path, length):
            try:
                assert contents(folder) == expected, where
            except KbitError as error:
                refused += 1
                assert str(folder) in str(error), where
    assert refused > 50
    assert contents(folder) == expected


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
def test_damage_to_a_plain_file_stays_where_it_is(tmp_path: Path, small_model: Path, kind: str) -> None:
    """A damaged header is refused, or describes a model that reads as well; damaged data change one tensor each."""
    if kind == "gguf":
        path = model = Model("llama").write(tmp_path / "model.gguf")
        places = [(tensor.offset, tensor.offset + tensor.nbytes) for tensor in read_header(path).tensors.values()]
    else:
        model = tmp_path / "model"
        model.mkdir()
        for name in ("config.json", "model.safetensors"):
            (model / name).write_bytes((small_model / name).read_bytes())
        path = model / "model.safetensors"
        file = SafetensorsFile(path)
        places = [(tensor.begin, tensor.end) for tensor in file.tensors.values()]
        file.close()
    data_start = min(begin for begin, _ in places)
    expected = contents(model)
    refused = changed = 0
    for where in damaged(path, data_start):
        try:
            found = contents(model)
        except KbitError as error:
            refused += 1
            assert str(model) in str(error), where
            continue
        first = int(where.split()[1])
        if first >= data_start:
            differing = [name for name in expected if found[name] != expected[name]]
            touched = sum(begin < first + DATA_STEP and end > first for begin, end in places)
            assert len(differing) <= touched, where
            changed += bool(differing)
    assert refused > 20
    assert changed > 20


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("kind", ["kbit", "safetensors", "gguf"])
def test_truncated_at_every_percent(tmp_path: Path, small_model: Path, kind: str) -> None:
    if kind == "gguf":
        path = model = Model("llama").write(tmp_path / "model.gguf")
    else:
        model = tmp_path / "model"
        quantize(small_model, model, "nf4-b64")
        if kind == "safetensors":
            (model / "kbit-manifest.json").unlink()
            for name in ("config.json", "model.safetensors"):
                (model / name).write_bytes((small_model / name).read_bytes())
        path = model / "model.safetensors"
    whole = path.read_bytes()
    for percent in range(100):
        path.write_bytes(whole[: len(whole) * percent // 100])
        with pytest.raises(CheckpointError) as caught:
            contents(model)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    path.write_bytes(whole)
    contents(model)


def test_a_gguf_file_that_shrinks_while_its_header_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read and not mapped: the system ends a process that looks at pages that a file no longer has."""
    path = Model("llama").write(tmp_path / "model.gguf")
    real = os.fstat

    def shrinks(descriptor: int) -> os.stat_result:
        status = real(descriptor)
        os.truncate(path, 1000)
        return status

    monkeypatch.setattr(os, "fstat", shrinks)
    with pytest.raises(CheckpointError, match="changed while it was read; run the command again"):
        read_header(path)


def test_a_header_longer_than_what_is_read_of_it_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Model("llama").write(tmp_path / "model.gguf")
    expected = read_header(path)
    for first in (24, 25, 100, 1000):
        monkeypatch.setattr("kbit.checkpoint.gguf.header._READ_BYTES", (first, 2 * first, 1 << 20))
        found = read_header(path)
        assert (found.raw, found.tensors) == (expected.raw, expected.tensors)
