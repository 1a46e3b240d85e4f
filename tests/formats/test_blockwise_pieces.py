"""Blockwise quantization and decoding in pieces: the same bits, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from format_cases import STORAGE, assert_same, normal, parse
from torch.utils._python_dispatch import TorchDispatchMode

from kbit.formats import blockwise, quant_tensor
from kbit.formats.blockwise import quantize_blockwise, quantize_rows


@pytest.mark.parametrize("text", [*(f"{base}4-b32" for base in ("int", "float", "dynamic", "nf", "lloyd")), *STORAGE])
def test_small_chunks_give_the_same_bits(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fmt = parse(text)
    x = normal(10, 90, seed=5)
    monkeypatch.setattr(blockwise, "QUANTILE_SAMPLE", 100)  # 900 weights: quantiles come from every ninth or so
    whole = quantize_blockwise(x, fmt)
    for weights in (1, 90, 91, 300, 899):
        monkeypatch.setattr(blockwise, "CHUNK_WEIGHTS", weights)
        assert_same(quantize_blockwise(x, fmt), whole)
    assert_same(quantize_blockwise(x, fmt, like=whole), whole)


def test_every_row_is_read_twice_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "CHUNK_WEIGHTS", 300)
    x = normal(10, 100)
    asked: list[tuple[int, int]] = []

    def read(start: int, stop: int) -> torch.Tensor:
        asked.append((start, stop))
        return x[start:stop]

    quantize_rows(read, (10, 100), parse("nf4"))
    assert asked == 2 * [(0, 3), (3, 6), (6, 9), (9, 10)]
    asked.clear()
    quantize_rows(read, (3, 100), parse("nf4"))  # one chunk: kept from the first pass for the second
    assert asked == [(0, 3)]


class LargestTensor(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the largest result of any torch operation, in elements."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numel = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("text", ["nf4-b64", "nf4-b4096", "int3-b16-asym-dq", "lloyd8-b16", "float5-row"])
def test_scratch_memory_is_a_chunk(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "CHUNK_WEIGHTS", 1000)
    monkeypatch.setattr(quant_tensor, "_CHUNK_WEIGHTS", 1000)
    fmt, x = parse(text), normal(400, 20)
    quantize_blockwise(x[:1], fmt)  # codebooks are made once, by operations of their own
    stored = max(part.nbytes for part in fmt.parts(400, 20).values())
    with LargestTensor() as largest:
        q = quantize_rows(lambda start, stop: x[start:stop], (400, 20), fmt)
    # A short last block is filled up, to less than twice the row, and a 4096 block over 20 weights not at all.
    assert largest.numel <= max(2 * 1000, stored)
    with LargestTensor() as largest:
        q.dequantize()
    assert largest.numel <= max(2 * 1000, stored, x.numel())


def test_quantile_sample_leaves_no_column_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 columns, every 16th weight: a stride of 16 would see 4 of the columns, here the four that are zero."""
    monkeypatch.setattr(blockwise, "QUANTILE_SAMPLE", 256)
    x = normal(64, 64)
    x[:, ::16] = 0
    sampled = quantize_blockwise(x, parse("quantile4")).codebook
    monkeypatch.undo()
    full = quantize_blockwise(x, parse("quantile4")).codebook
    # Standard error of a quantile from n = 240: sqrt(p (1 - p) / n) / density; worst at the outermost, p = 1/30 with
    # density .074: .16, in units of the largest level (1.8): .09. Four of them.
    assert (sampled - full).abs().max() <= 0.36


@pytest.mark.parametrize("text", STORAGE)
def test_decoding_in_pieces_by_row_and_to_other_types(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q = quantize_blockwise(normal(11, 70, seed=6), parse(text))
    values = q.dequantize()
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(q.dequantize(dtype), values.to(dtype))
    rows = torch.tensor([10, 0, 3, 3, 7])
    assert torch.equal(q.dequantize_rows(rows), values[rows])
    assert q.dequantize_rows(torch.tensor([], dtype=torch.int64)).shape == (0, 70)
    monkeypatch.setattr(quant_tensor, "_CHUNK_WEIGHTS", 200)
    assert torch.equal(q.dequantize(), values)
    assert_same(q.to("cpu"), q)
