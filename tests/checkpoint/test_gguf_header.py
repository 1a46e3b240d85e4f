"""GGUF headers: what valid files mean."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_header_cases import NAME, array, build, key, row, text

from kbit.checkpoint.gguf.header import parse_header, read_header
from kbit.checkpoint.gguf.metadata import GGUFHeader
from kbit.checkpoint.gguf.types import GGML_TYPES
from kbit.host.errors import CheckpointError


def test_valid_file() -> None:
    header = parse_header(build(), NAME)
    assert header.string("general.architecture") == "llama"
    a, b = header.tensors.values()
    assert (a.shape, a.type.name, a.nbytes) == ((4, 8), "F32", 128)
    assert (b.shape, b.type.name, b.nbytes) == ((32,), "Q8_0", 34)
    assert a.offset == header.data_start
    assert b.offset == header.data_start + 128
    assert header.file_size == b.offset + b.nbytes


def test_version_2_reads_like_version_3() -> None:
    assert parse_header(build(version=2), NAME).tensors == parse_header(build(version=3), NAME).tensors


def test_values_equal_those_of_the_gguf_package(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "all.gguf", "llama")
    scalars = {"uint8": 200, "int8": -3, "uint16": 60000, "int16": -300, "uint32": 1 << 31, "int32": -(1 << 20)}
    scalars |= {"uint64": 1 << 40, "int64": -(1 << 40)}
    for name, value in scalars.items():
        getattr(writer, f"add_{name}")(f"x.{name}", value)
    writer.add_float32("x.float32", 0.1)
    writer.add_float64("x.float64", 0.1)
    writer.add_bool("x.bool", True)
    writer.add_string("x.string", "ünï\n")
    writer.add_array("x.strings", ["a", "", "漢字"])
    writer.add_array("x.ints", [1, -2, 3])
    writer.add_array("x.floats", [0.5, -1.25])
    writer.add_array("x.bools", [True, False])
    writer.add_tensor("t", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("half", np.zeros((3, 5, 7), dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    header = read_header(tmp_path / "all.gguf")
    reader = gguf.GGUFReader(tmp_path / "all.gguf")
    theirs = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert {name: header.value(name) for name in header} == theirs
    assert header.integer("x.int64") == -(1 << 40)
    assert header.strings("x.strings") == ["a", "", "漢字"]
    assert header.numbers("x.floats") == [0.5, -1.25]
    assert header.count("x.strings") == 3
    assert header.count("x.string") == 0
    assert header.string("absent") is None
    for tensor in reader.tensors:
        ours = header.tensors[tensor.name]
        assert ours.shape == tuple(int(dim) for dim in reversed(tensor.shape))
        assert (ours.offset, ours.nbytes, ours.type.name) == (
            tensor.data_offset,
            tensor.n_bytes,
            tensor.tensor_type.name,
        )


def test_type_table_equals_the_gguf_packages() -> None:
    """Q8_1 is left out: gguf still states 40 bytes (two float32 scales); ggml's block has had 36 since its scales
    became float16. No file stores the type."""
    theirs = {int(kind): (kind.name, *gguf.GGML_QUANT_SIZES[kind]) for kind in gguf.GGMLQuantizationType}
    ours = {number: (kind.name, kind.block, kind.block_bytes) for number, kind in GGML_TYPES.items()}
    common = (set(theirs) & set(ours)) - {int(gguf.GGMLQuantizationType.Q8_1)}
    assert len(common) >= 30
    assert {number: ours[number] for number in common} == {number: theirs[number] for number in common}


def test_nested_arrays() -> None:
    inner = [array(5, [struct.pack("<i", 7)]), array(8, [text("x"), text("y")])]
    header = parse_header(build([key("x.nested", 9, array(9, inner))]), NAME)
    assert header.value("x.nested") == [[7], ["x", "y"]]


def test_custom_alignment() -> None:
    rows = [row("a", (8, 4), 0, 0), row("b", (32,), 8, 128)]
    raw = build([key("general.alignment", 4, struct.pack("<I", 64))], rows, data=300)
    header = parse_header(raw, NAME)
    assert header.alignment == 64
    assert header.data_start % 64 == 0


@pytest.mark.parametrize(
    ("name", "call", "words"),
    [
        ("x.string", GGUFHeader.integer, "should be an integer, but is stored as string"),
        ("x.int", GGUFHeader.string, "should be a string, but is stored as uint32"),
        ("x.int", GGUFHeader.flag, "should be true or false, but is stored as uint32"),
        ("x.string", GGUFHeader.number, "should be a number, but is stored as string"),
        ("x.int", GGUFHeader.strings, "should be an array of strings, but is stored as uint32"),
        ("x.ints", GGUFHeader.strings, "should be an array of strings, but is stored as array of int32"),
        ("x.bool", GGUFHeader.flag, "a boolean that is neither 0 nor 1"),
        ("x.broken", GGUFHeader.string, "a string that is not UTF-8"),
    ],
)
def test_wrong_value_types(name: str, call: Callable[[GGUFHeader, str], object], words: str) -> None:
    keys = [
        key("x.string", 8, text("s")),
        key("x.int", 4, struct.pack("<I", 1)),
        key("x.ints", 9, array(5, [struct.pack("<i", 7)])),
        key("x.bool", 7, b"\x02"),
        key("x.broken", 8, struct.pack("<Q", 2) + b"\xff\xfe"),
    ]
    header = parse_header(build(keys), NAME)
    with pytest.raises(CheckpointError, match=re.escape(words)) as caught:
        call(header, name)
    assert "model.gguf" in str(caught.value)
    assert name in str(caught.value)


def test_opening_imports_neither_torch_nor_numpy(tmp_path: Path) -> None:
    path = tmp_path / "small.gguf"
    path.write_bytes(build())
    code = (
        "import sys, pathlib; from kbit.checkpoint.gguf import header, source;"
        f"header.read_header(pathlib.Path({str(path)!r}));"
        "print(sorted({'torch', 'numpy', 'gguf', 'tokenizers'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert result.stdout.strip() == "[]"


def test_real_header(smollm2_gguf: Path, record_property: Callable[[str, object], None]) -> None:
    start = time.perf_counter()
    header = read_header(smollm2_gguf)
    seconds = time.perf_counter() - start
    record_property("header_seconds", seconds)
    print(f"\nheader of {smollm2_gguf.name}: {seconds * 1e3:.1f} ms")
    assert len(header.tensors) == 272
    assert header.count("tokenizer.ggml.tokens") == 49152
    merges = header.strings("tokenizer.ggml.merges")
    assert merges is not None
    assert merges[:2] == ["Ġ t", "Ġ a"]
    assert header.tensors["token_embd.weight"].shape == (49152, 576)
