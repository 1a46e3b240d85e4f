"""Safetensors files: what is read equals the safetensors library's."""

from __future__ import annotations

import json
import struct
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from safetensors_cases import entry, file_bytes, random_tensor, written

from kbit.checkpoint.readers.safetensors_file import SafetensorsFile

DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
SHAPES: tuple[tuple[int, ...], ...] = ((), (0,), (1,), (7,), (2, 0, 3), (3, 0), (0, 3), (5, 7), (2, 3, 5), (1, 1, 1, 9))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    def bits(x: torch.Tensor) -> torch.Tensor:
        return x.contiguous().view(-1).view(torch.uint8)

    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_shape_equals_the_library(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {f"t{i}": random_tensor(shape, dtype, seed=i) for i, shape in enumerate(SHAPES)}
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    expected = load_file(path)
    file = SafetensorsFile(path)
    assert file.metadata == {"format": "pt"}
    assert file.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert file.tensors[name].shape == tuple(tensor.shape)
        assert file.tensors[name].nbytes == tensor.numel() * tensor.element_size()
        assert same_bits(file.read(name), tensor), name
    file.close()


def test_row_ranges(tmp_path: Path) -> None:
    tensors = {"a": random_tensor((13, 5), torch.bfloat16), "b": random_tensor((6, 2, 3), torch.float32, 1)}
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    file = SafetensorsFile(path)
    for name, tensor in tensors.items():
        rows = tensor.shape[0]
        for start in range(rows + 1):
            for stop in range(start, rows + 1):
                assert same_bits(file.read(name, start, stop), tensor[start:stop]), (name, start, stop)
    assert file.bytes_of("a", 3, 17) == bytes(tensors["a"].view(torch.uint8).view(-1)[3:17].numpy())
    assert file.bytes_of("a", 4, 4) == b""
    file.close()


def test_data_need_not_be_aligned(tmp_path: Path) -> None:
    """Old writers did not pad the header; float32 data then starts at any byte."""
    values = torch.arange(6, dtype=torch.float32).view(2, 3)
    for padding in range(8):
        header = json.dumps({"x": entry("F32", (2, 3), 0, 24)}).encode() + b" " * padding
        file = SafetensorsFile(written(tmp_path, file_bytes(header, values.numpy().tobytes())))
        assert torch.equal(file.read("x"), values)
        assert torch.equal(file.read("x", 1, 2), values[1:])
        file.close()


def test_results_own_their_memory(tmp_path: Path) -> None:
    path = written(tmp_path, file_bytes({"x": entry()}, struct.pack("<2f", 1, 2)))
    file = SafetensorsFile(path)
    first = file.read("x")
    first += 10
    assert file.read("x").tolist() == [1, 2]
    file.close()
    assert first.tolist() == [11, 12]


def test_the_check_sees_the_stored_bytes(tmp_path: Path) -> None:
    data = struct.pack("<2f", 1, 2)
    file = SafetensorsFile(written(tmp_path, file_bytes({"x": entry()}, data)))
    seen: list[bytes] = []
    file.read("x", check=lambda raw: seen.append(bytes(raw)))
    assert seen == [data]
    file.close()


def test_a_file_without_tensors(tmp_path: Path) -> None:
    assert SafetensorsFile(written(tmp_path, file_bytes({}))).tensors == {}
    assert SafetensorsFile(written(tmp_path, file_bytes({"__metadata__": {"a": "b"}}))).metadata == {"a": "b"}


def test_opening_reads_no_data(tmp_path: Path) -> None:
    """Eight gigabytes of (sparse) data are opened, and a row read, in a megabyte."""
    rows = 1 << 20
    head = file_bytes({"x": entry("F32", (rows, 2048), 0, rows * 2048 * 4)})
    path = tmp_path / "model.safetensors"
    with path.open("wb") as out:
        out.write(head)
        out.truncate(len(head) + rows * 2048 * 4)
    tracemalloc.start()
    file = SafetensorsFile(path)
    assert not file.read("x", rows - 1, rows).any()
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    file.close()
