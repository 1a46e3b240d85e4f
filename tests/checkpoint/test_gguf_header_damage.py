"""Damaged GGUF headers: none gets past the parser or crashes it."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest
from gguf_header_cases import ARCHITECTURE, NAME, TWO_ROWS, array, build, key, row, text
from hypothesis import given, settings
from hypothesis import strategies as st

from kbit.checkpoint.gguf import header as gguf_header
from kbit.checkpoint.gguf.header import parse_header, read_header
from kbit.host.errors import CheckpointError, KbitError, UnsupportedError

HUGE = struct.pack("<Q", 1 << 62)
DEEP = array(9, [array(9, [array(9, [array(9, [array(4, [])])])])])

CORRUPTIONS: dict[str, tuple[bytes, type[KbitError], str]] = {
    "wrong magic": (build(magic=b"FUGG"), CheckpointError, "not a GGUF file (it starts with b'FUGG')"),
    "four bytes": (b"GGUF", CheckpointError, "truncated inside its header: 24 bytes needed, the file has 4"),
    "cut in the counts": (build()[:20], CheckpointError, "needs 24 bytes, the file has 20"),
    "version 1": (build(version=1), UnsupportedError, "GGUF version 1"),
    "version 4": (build(version=4), UnsupportedError, "GGUF version 4; kbit reads versions 2 and 3"),
    "big-endian": (build(order=">"), UnsupportedError, "big-endian"),
    "absurd key count": (build(n_keys=1 << 60), CheckpointError, "claims 1152921504606846976 metadata keys"),
    "absurd tensor count": (build(n_tensors=1 << 60), CheckpointError, "claims 1152921504606846976 tensors"),
    "cut before the tensor table": (build()[:60], CheckpointError, "claims 2 tensors, more than the file's 60 bytes"),
    "cut in a key": (build(rows=[])[:40], CheckpointError, "metadata key 1 of 1 needs 52 bytes, the file has 40"),
    "absurd key length": (build([HUGE + b"x"]), CheckpointError, "claims a name of 4611686018427387904 bytes"),
    "key not UTF-8": (
        build([struct.pack("<Q", 2) + b"\xff\xff" + struct.pack("<IB", 0, 1)]),
        CheckpointError,
        "metadata key 1 of 1 has a name that is not UTF-8",
    ),
    "absurd string length": (build([key("x.s", 8, HUGE)]), CheckpointError, "metadata key 'x.s' needs"),
    "unknown value type": (build([key("x.v", 13, b"")]), CheckpointError, "'x.v' has the unknown value type 13"),
    "unknown element type": (build([key("x.v", 9, array(77, []))]), CheckpointError, "unknown value type 77"),
    "absurd array length": (
        build([key("x.v", 9, struct.pack("<IQ", 4, 1 << 61))]),
        CheckpointError,
        "'x.v' claims an array of 2305843009213693952 elements",
    ),
    "array past the end": (
        build([key("x.v", 9, struct.pack("<IQ", 4, 1 << 20))]),
        CheckpointError,
        "metadata key 'x.v' needs",
    ),
    "strings past the end": (
        build([key("x.v", 9, struct.pack("<IQ", 8, 1 << 20))]),
        CheckpointError,
        "metadata key 'x.v' needs",
    ),
    "string in an array past the end": (build([key("x.v", 9, array(8, [HUGE]))]), CheckpointError, "'x.v' needs"),
    "deeply nested arrays": (build([key("x.v", 9, DEEP)]), CheckpointError, "nests arrays more than 4 deep"),
    "duplicate key": (build([ARCHITECTURE] * 2), CheckpointError, "'general.architecture' appears twice"),
    "key with a line break": (
        build([key("x\ny", 8, text("")), key("x\ny", 8, text(""))]),
        CheckpointError,
        "metadata key 'x\\ny' appears twice",
    ),
    "no dimensions": (build(rows=[row("a", (), 0, 0)]), CheckpointError, "'a' claims 0 dimensions"),
    "five dimensions": (build(rows=[row("a", (1,) * 5, 0, 0)]), CheckpointError, "'a' claims 5 dimensions"),
    "a zero dimension": (build(rows=[row("a", (4, 0), 0, 0)]), CheckpointError, "'a' has a dimension of 0"),
    "overflowing shape": (
        build(rows=[row("a", (1 << 33, 1 << 33), 0, 0)]),
        CheckpointError,
        "'a' claims the absurd shape (8589934592, 8589934592)",
    ),
    "unknown tensor type": (
        build(rows=[row("a", (32,), 99, 0)]),
        UnsupportedError,
        "'a' has the unknown type number 99",
    ),
    "removed tensor type": (build(rows=[row("a", (32,), 31, 0)]), UnsupportedError, "'a' has the type Q4_0_4_4"),
    "row not whole blocks": (
        build(rows=[row("a", (33, 2), 8, 0)]),
        CheckpointError,
        "rows of 33 values, not a multiple of Q8_0's block of 32",
    ),
    "duplicate tensor": (build(rows=[TWO_ROWS[0], row("a", (8,), 0, 128)]), CheckpointError, "'a' appears twice"),
    "alignment 24": (
        build([key("general.alignment", 4, struct.pack("<I", 24))]),
        CheckpointError,
        "general.alignment is 24, not a power of two",
    ),
    "alignment 0": (build([key("general.alignment", 4, bytes(4))]), CheckpointError, "general.alignment is 0"),
    "alignment 2 GiB": (
        build([key("general.alignment", 4, struct.pack("<I", 1 << 31))]),
        CheckpointError,
        "general.alignment is 2147483648",
    ),
    "alignment of another type": (
        build([key("general.alignment", 8, text("32"))]),
        CheckpointError,
        "'general.alignment' should be uint32, but is string",
    ),
    "unaligned offset": (
        build(rows=[TWO_ROWS[0], row("b", (32,), 8, 130)]),
        CheckpointError,
        "'b' starts at offset 130, not a multiple of 32",
    ),
    "overlapping tensors": (
        build(rows=[TWO_ROWS[0], row("b", (32,), 8, 96)]),
        CheckpointError,
        "tensors 'a' and 'b' overlap",
    ),
    "offset far outside": (
        build(rows=[TWO_ROWS[0], row("b", (32,), 8, 1 << 62)]),
        CheckpointError,
        "bytes expected (to the end of tensor 'b')",
    ),
    "data cut short": (build(data=161), CheckpointError, "found; download it again"),
}


@pytest.mark.parametrize("case", CORRUPTIONS)
def test_corruptions_are_named(case: str, tmp_path: Path) -> None:
    raw, error, words = CORRUPTIONS[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(raw)
    with pytest.raises(error, match=re.escape(words)) as caught:
        read_header(path)
    message = str(caught.value)
    assert "bad.gguf" in message
    assert "\n" not in message
    assert caught.value.exit_code == 1


def test_truncation_tells_expected_and_found() -> None:
    whole = build()
    with pytest.raises(CheckpointError, match=f"{len(whole)} bytes expected .* {len(whole) - 10} found"):
        parse_header(whole[:-10], NAME)


def test_every_truncation_is_refused() -> None:
    whole = build()
    for length in range(len(whole)):
        with pytest.raises(CheckpointError):
            parse_header(whole[:length], NAME)


def test_header_size_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_header, "MAX_HEADER_BYTES", 100)
    with pytest.raises(CheckpointError, match="the header is larger than"):
        parse_header(build([key("x.long", 8, text("x" * 200))]), NAME)


@pytest.mark.parametrize(("limit", "what"), [("MAX_KEYS", "metadata keys"), ("MAX_TENSORS", "tensors")])
def test_number_of_entries_is_limited(limit: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is made of them, and only beyond the limit."""
    most = getattr(gguf_header, limit)
    counts = {"n_keys": most + 1} if limit == "MAX_KEYS" else {"n_tensors": most + 1}
    # Zeros: the numbers could be true of a file of this size.
    with pytest.raises(CheckpointError, match=rf"claims {most + 1} {what} \(at most {most} in a file\)"):
        parse_header(build(**counts, data=33 * (most + 1)), NAME)
    keys = [ARCHITECTURE, key("a", 4, bytes(4))]
    monkeypatch.setattr(gguf_header, limit, 2)
    assert len(parse_header(build(keys), NAME).tensors) == 2
    monkeypatch.setattr(gguf_header, limit, 1)
    with pytest.raises(CheckpointError, match=f"claims 2 {what}"):
        parse_header(build(keys), NAME)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.gguf: cannot read the file \(No such file"):
        read_header(tmp_path / "none.gguf")
    with pytest.raises(CheckpointError, match="cannot read the file"):
        read_header(tmp_path)
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(CheckpointError, match=r"empty\.gguf: the file is empty"):
        read_header(tmp_path / "empty.gguf")


RICH = build(
    [
        ARCHITECTURE,
        key("general.alignment", 4, struct.pack("<I", 32)),
        key("x.strings", 9, array(8, [text("a"), text("bc"), text("")])),
        key("x.numbers", 9, array(6, [struct.pack("<f", 0.5)] * 3)),
        key("x.nested", 9, array(9, [array(5, [struct.pack("<i", 7)] * 2)])),
        key("x.flag", 7, b"\x01"),
    ]
)


def decode_all(raw: bytes) -> None:
    header = parse_header(raw, NAME)
    for name in header:
        header.value(name)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_damage_raises_nothing_but_kbit_errors(data: st.DataObject) -> None:
    """Flipped bytes, then cut or grown; a damaged file may still be valid, but never crash or hang the parser."""
    raw = bytearray(RICH)
    for position in data.draw(st.lists(st.integers(0, len(raw) - 1), max_size=6), label="positions"):
        raw[position] = data.draw(st.integers(0, 255), label="byte")
    cut = data.draw(st.integers(0, len(raw)), label="length")
    raw = raw[:cut] if data.draw(st.booleans(), label="truncate") else raw
    try:
        decode_all(bytes(raw))
    except KbitError as error:
        assert "\n" not in str(error)
        assert "model.gguf" in str(error)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=400), st.integers(0, 50), st.integers(0, 50))
def test_random_bytes_after_a_valid_start(noise: bytes, n_tensors: int, n_keys: int) -> None:
    raw = b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_keys) + noise
    try:
        decode_all(raw)
    except KbitError as error:
        assert "\n" not in str(error)


def test_hostile_arrays_are_stopped_by_their_claim() -> None:
    """16 MiB of zeros read as arrays of arrays of empty strings: the element limit stops it early."""
    raw = build([key("x.v", 9, struct.pack("<IQ", 8, (1 << 24) + 1) + bytes(1 << 24))])
    with pytest.raises(CheckpointError, match=r"claims an array of 16777217 elements \(at most 16777216 in a file\)"):
        parse_header(raw, NAME)
