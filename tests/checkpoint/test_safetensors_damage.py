"""Damaged and hostile safetensors files: no header is believed, and what is refused is named."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors_cases import entry, file_bytes, random_tensor, written

from kbit.checkpoint.readers.safetensors_file import SafetensorsFile
from kbit.host.errors import CheckpointError, KbitError, UnsupportedError


@pytest.fixture
def write(tmp_path: Path) -> Callable[[bytes], Path]:
    return partial(written, tmp_path)


GOOD = {"x": entry("F32", (2,), 0, 8)}
EIGHT = b"\0" * 8
DEEP = b'{"x":' + b"[" * 200_000
ATTACKS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "too few"),
    "seven bytes": (b"\1\0\0\0\0\0\0", "too few"),
    "length beyond the file": (struct.pack("<Q", 100) + b"{}", "truncated"),
    "length of 2^64 - 1": (struct.pack("<Q", 2**64 - 1) + b"{}", "18446744073709551615 bytes long"),
    "length of 100 MB": (struct.pack("<Q", 100_000_001) + b"{}", "100000001 bytes long"),
    "length of 0": (struct.pack("<Q", 0), "not valid JSON"),
    "length one short": (struct.pack("<Q", len(json.dumps(GOOD)) - 1) + file_bytes(GOOD, EIGHT)[8:], "not valid JSON"),
    "not JSON": (file_bytes(b"{'x': 1}"), "not valid JSON"),
    "not UTF-8": (file_bytes(b'{"\xff": 1}'), "not valid JSON"),
    "endless nesting": (file_bytes(DEEP), "not valid JSON"),
    "a number of 5000 digits": (file_bytes(b'{"x":' + b"1" * 5000 + b"}"), "x"),
    "a list": (file_bytes([1, 2]), "not a JSON object"),
    "a string": (file_bytes("x"), "not a JSON object"),
    "null": (file_bytes(None), "not a JSON object"),
    "duplicate names": (file_bytes(b'{"x":%s,"x":%s}' % ((json.dumps(entry()).encode(),) * 2), EIGHT), "twice"),
    "entry is a number": (file_bytes({"x": 3}), "x: header entry lacks"),
    "entry is a list": (file_bytes({"x": ["F32", [2], [0, 8]]}), "x: header entry lacks"),
    "no dtype": (file_bytes({"x": {"shape": [2], "data_offsets": [0, 8]}}, EIGHT), "x: header entry lacks"),
    "no shape": (file_bytes({"x": {"dtype": "F32", "data_offsets": [0, 8]}}, EIGHT), "x: header entry lacks"),
    "no offsets": (file_bytes({"x": {"dtype": "F32", "shape": [2]}}, EIGHT), "x: header entry lacks"),
    "unknown dtype": (file_bytes({"x": entry("Q4_K")}, EIGHT), "dtype 'Q4_K'; kbit reads BOOL"),
    "dtype in lower case": (file_bytes({"x": entry("f32")}, EIGHT), "dtype 'f32'"),
    "dtype is a list": (file_bytes({"x": {**entry(), "dtype": ["F32"]}}, EIGHT), "dtype"),
    "dtype is an object": (file_bytes({"x": {**entry(), "dtype": {}}}, EIGHT), "dtype"),
    "dtype is null": (file_bytes({"x": {**entry(), "dtype": None}}, EIGHT), "dtype 'None'"),
    "negative dim": (file_bytes({"x": entry(shape=[-2])}, EIGHT), "impossible shape"),
    "two negative dims": (file_bytes({"x": entry(shape=[-1, -2])}, EIGHT), "impossible shape"),
    "float dim": (file_bytes({"x": entry(shape=[2.0])}, EIGHT), "impossible shape"),
    "infinite dim": (file_bytes({"x": entry(shape=[float("inf")])}, EIGHT), "impossible shape"),
    "boolean dim": (file_bytes({"x": entry(shape=[True, 2])}, EIGHT), "impossible shape"),
    "string dim": (file_bytes({"x": entry(shape=["2"])}, EIGHT), "impossible shape"),
    "null dim": (file_bytes({"x": entry(shape=[None])}, EIGHT), "impossible shape"),
    "shape is a number": (file_bytes({"x": entry(shape=2)}, EIGHT), "impossible shape"),
    "shape is an object": (file_bytes({"x": entry(shape={"0": 2})}, EIGHT), "impossible shape"),
    "dim of 2^63": (file_bytes({"x": entry(shape=[2**63])}, EIGHT), "impossible shape"),
    "dims that overflow to the right size": (file_bytes({"x": entry(shape=[2**62, 4, 2])}, EIGHT), "impossible shape"),
    "dims that overflow, times zero": (file_bytes({"x": entry(shape=[2**62, 2**62, 0], end=0)}), "impossible shape"),
    "nine dims": (file_bytes({"x": entry(shape=[1] * 8 + [2])}, EIGHT), "impossible shape"),
    "a million dims": (file_bytes({"x": entry(shape=[1] * 1_000_000)}, EIGHT), "impossible shape"),
    "negative offset": (file_bytes({"x": entry(begin=-8, end=0)}, EIGHT), "impossible data_offsets"),
    "float offset": (file_bytes({"x": entry(begin=0.0, end=8.0)}, EIGHT), "impossible data_offsets"),
    "boolean offset": (file_bytes({"x": entry(shape=[], begin=False, end=4)}, b"\0" * 4), "impossible data_offsets"),
    "offsets swapped": (file_bytes({"x": entry(begin=8, end=0)}, EIGHT), "impossible data_offsets"),
    "three offsets": (file_bytes({"x": {**entry(), "data_offsets": [0, 4, 8]}}, EIGHT), "impossible data_offsets"),
    "offsets are null": (file_bytes({"x": {**entry(), "data_offsets": None}}, EIGHT), "impossible data_offsets"),
    "beyond the file": (file_bytes({"x": entry(shape=(4,), end=16)}, EIGHT), "ends at byte 16 of 8: the file is trunc"),
    "far beyond the file": (file_bytes({"x": entry(begin=2**62, end=2**62 + 8)}, EIGHT), "the file is truncated"),
    "shape too large for its span": (file_bytes({"x": entry(shape=(3,))}, EIGHT), "12 bytes, but spans 8"),
    "shape too small for its span": (file_bytes({"x": entry(shape=(1,))}, EIGHT), "4 bytes, but spans 8"),
    "empty shape with data": (file_bytes({"x": entry(shape=(0,))}, EIGHT), "0 bytes, but spans 8"),
    "the same bytes twice": (file_bytes({"x": entry(), "y": entry()}, EIGHT), "y overlaps x"),
    "overlap by one byte": (
        file_bytes({"x": entry("U8", (5,), 0, 5), "y": entry("U8", (4,), 4, 8)}, EIGHT),
        "y overlaps x",
    ),
    "one inside the other": (
        file_bytes({"x": entry("U8", (8,), 0, 8), "y": entry("U8", (2,), 3, 5)}, EIGHT),
        "y overlaps x",
    ),
    "hole at the start": (file_bytes({"x": entry(begin=8, end=16)}, EIGHT * 2), "8 unaccounted bytes before x"),
    "hole between": (
        file_bytes({"x": entry("U8", (3,), 0, 3), "y": entry("U8", (4,), 4, 8)}, EIGHT),
        "1 unaccounted bytes before y",
    ),
    "garbage at the end": (file_bytes(GOOD, EIGHT + b"!"), "1 bytes after the last tensor"),
    "data without tensors": (file_bytes({}, EIGHT), "8 bytes after the last tensor"),
    "a zip archive": (b"PK\x03\x04" + b"\0" * 100, "pickle"),
    "a pickle of protocol 2": (b"\x80\x02}q\x00X\x05" + b"\0" * 100, "pickle"),
    "terminal escapes in a name": (file_bytes({"\x1b[2Jx": entry()}, EIGHT), r"'\\x1b\[2Jx' is no name"),
    "a name of two lines": (file_bytes({"a\nb": entry()}, EIGHT), r"'a\\nb' is no name"),
    "a lone surrogate in a name": (file_bytes(b'{"\\ud800":%s}' % json.dumps(entry()).encode(), EIGHT), "no name"),
    "a name of a megabyte": (file_bytes({"x" * 1_000_000: entry()}, EIGHT), "no name"),
}


@pytest.mark.parametrize("case", ATTACKS)
def test_attack(write: Callable[[bytes], Path], case: str) -> None:
    content, message = ATTACKS[case]
    path = write(content)
    with pytest.raises(KbitError, match=message) as caught:
        SafetensorsFile(path)
    text = str(caught.value)
    assert isinstance(caught.value, (CheckpointError, UnsupportedError))
    assert str(path) in text
    assert len(text) < 600 + len(str(path))
    assert "\n" not in text
    assert "\x1b" not in text


def test_unknown_dtype_is_unsupported_not_damaged(write: Callable[[bytes], Path]) -> None:
    with pytest.raises(UnsupportedError):
        SafetensorsFile(write(file_bytes({"x": entry("F4", (4, 4), 0, 8)}, EIGHT)))


def test_a_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "executed"

    class Bomb:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(marker),))

    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path = tmp_path / f"{protocol}.safetensors"
        path.write_bytes(pickle.dumps(Bomb(), protocol=protocol) + b"\0" * 100)
        with pytest.raises(CheckpointError):
            SafetensorsFile(path)
    torch.save({"x": torch.zeros(2)}, tmp_path / "zip.safetensors")
    with pytest.raises(CheckpointError, match="looks like a pickle, which kbit never loads"):
        SafetensorsFile(tmp_path / "zip.safetensors")
    assert not marker.exists()


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be opened"):
        SafetensorsFile(tmp_path / "missing.safetensors")
    with pytest.raises(CheckpointError, match="cannot be opened"):
        SafetensorsFile(tmp_path)


def test_a_disk_that_fails_while_the_header_is_read(
    write: Callable[[bytes], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class FailingFile(io.BytesIO):
        def fileno(self) -> int:
            return descriptor

        def read(self, size: int | None = -1) -> bytes:
            raise OSError(5, "Input/output error")

    path = write(file_bytes(GOOD, EIGHT))
    file = FailingFile()
    with path.open("rb") as real:
        descriptor = real.fileno()
        monkeypatch.setattr(Path, "open", lambda *_: file)
        with pytest.raises(CheckpointError, match=rf"{path}: cannot be read \(Input/output error\)"):
            SafetensorsFile(path)
    assert file.closed


def test_a_file_that_shrinks_while_it_is_open(write: Callable[[bytes], Path]) -> None:
    """With a mapped file this would end the process with SIGBUS."""
    content = file_bytes({"x": entry("F32", (1 << 16,), 0, 1 << 18)}, b"\0" * (1 << 18))
    path = write(content)
    file = SafetensorsFile(path)
    os.truncate(path, len(content) - 1)
    with pytest.raises(CheckpointError, match="x: the file has shrunk"):
        file.read("x")
    os.truncate(path, 10)
    with pytest.raises(CheckpointError, match="x: the file has shrunk"):
        file.read("x", 0, 1)
    file.close()


def test_reading_after_close(write: Callable[[bytes], Path]) -> None:
    file = SafetensorsFile(write(file_bytes(GOOD, EIGHT)))
    file.close()
    with pytest.raises(CheckpointError, match="x cannot be read"):
        file.read("x")


def test_a_refused_file_is_closed(write: Callable[[bytes], Path]) -> None:
    path = write(file_bytes({"x": entry("nope")}, EIGHT))
    folder = Path("/proc/self/fd")
    if not folder.is_dir():
        pytest.skip("no /proc to count open files in")
    before = len(list(folder.iterdir()))
    for _ in range(5):
        with pytest.raises(UnsupportedError):
            SafetensorsFile(path)
    assert len(list(folder.iterdir())) == before


def valid_file() -> bytes:
    tensors = {
        "model.embed_tokens.weight": random_tensor((3, 4), torch.bfloat16),
        "a": random_tensor((5,), torch.float32, 1),
        "b": random_tensor((), torch.float16, 2),
        "c": random_tensor((0, 2), torch.uint8, 3),
        "d": random_tensor((2, 2), torch.float8_e4m3fn, 4),
    }
    from safetensors.torch import save

    return save(tensors, metadata={"format": "pt"})


VALID = valid_file()


def test_every_truncation_is_refused(write: Callable[[bytes], Path]) -> None:
    for length in range(len(VALID)):
        with pytest.raises(CheckpointError):
            SafetensorsFile(write(VALID[:length]))


def library_view(content: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    """What the safetensors library reads, or None where it refuses."""
    try:
        parsed = safetensors.deserialize(content)  # type: ignore[no-untyped-call]
    except Exception:
        return None
    return {name: (item["dtype"], tuple(item["shape"]), bytes(item["data"])) for name, item in parsed}


def kbit_view(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    """What kbit reads, or None where it refuses. Anything but a KbitError is a failure."""
    try:
        file = SafetensorsFile(path)
    except KbitError as error:
        assert "\n" not in str(error)
        return None
    try:
        return {name: (t.dtype, t.shape, bytes(file.bytes_of(name))) for name, t in file.tensors.items()}
    finally:
        file.close()


@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    flips=st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), min_size=1, max_size=4),
    cut=st.none() | st.integers(0, len(VALID)),
    tail=st.binary(max_size=3),
)
def test_whatever_is_accepted_is_read_as_the_library_reads_it(
    tmp_path: Path, flips: list[tuple[int, int]], cut: int | None, tail: bytes
) -> None:
    content = bytearray(VALID)
    for position, value in flips:
        content[position] = value
    damaged = bytes(content[:cut]) + tail
    path = tmp_path / "fuzz.safetensors"
    path.write_bytes(damaged)
    ours, theirs = kbit_view(path), library_view(damaged)
    if ours is not None and theirs is not None:
        assert ours == theirs


HEADER_PARTS = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=3), children, max_size=3),
    max_leaves=6,
)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    dtype=st.sampled_from(["F32", "F16", "U8", "I64"]) | HEADER_PARTS,
    shape=st.lists(st.integers(0, 4), max_size=3) | HEADER_PARTS,
    offsets=st.tuples(st.integers(0, 20), st.integers(0, 20)).map(list) | HEADER_PARTS,
    other=HEADER_PARTS,
)
def test_any_header_is_read_or_refused(tmp_path: Path, dtype: Any, shape: Any, offsets: Any, other: Any) -> None:
    header = {"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}, "__metadata__": other}
    content = file_bytes(header, b"\1" * 16)
    path = tmp_path / "fuzz.safetensors"
    path.write_bytes(content)
    ours, theirs = kbit_view(path), library_view(content)
    if theirs is not None:
        assert ours == theirs
