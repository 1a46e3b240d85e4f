"""Streams of codes and tables of levels in C++, against numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kbit import _native


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [1, 7, 8, 9, 31, 32, 64, 101])
def test_streams(bits: int, columns: int) -> None:
    """Bit by bit; rows may have bytes to spare, and what these hold does not matter."""
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 2**bits, (5, columns), dtype=np.uint8)
    flat = (codes[..., None] >> np.arange(bits) & 1).astype(np.uint8).reshape(5, -1)
    data = np.packbits(flat, axis=1, bitorder="little")
    found = np.empty_like(codes)
    _native.unpack_stream(data, bits, found)
    assert np.array_equal(found, codes)
    wider = np.concatenate([data, np.full((5, 3), 255, dtype=np.uint8)], axis=1)
    _native.unpack_stream(wider, bits, found)
    assert np.array_equal(found, codes)
    with pytest.raises(ValueError, match="data must have shape"):
        _native.unpack_stream(np.ascontiguousarray(data[:, :-1]), bits, found)


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_levels(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    levels = rng.integers(0, 60000, (7, 4, 8)).astype(dtype)
    codes = rng.integers(0, 8, (7, 24), dtype=np.uint8)
    out = np.empty((7, 24), dtype=dtype)
    for order in (None, rng.integers(0, 4, 24).astype(np.int32)):
        places = np.arange(24) // 6 if order is None else order
        _native.look_up_levels(codes, levels, order, out)
        assert np.array_equal(out, levels[np.arange(7)[:, None], places, codes])


def test_what_does_not_fit() -> None:
    levels, out = np.zeros((2, 3, 4), dtype=np.float32), np.zeros((2, 12), dtype=np.float32)
    codes = np.zeros((2, 12), dtype=np.uint8)
    for wrong in (codes + np.uint8(4), np.zeros((3, 12), dtype=np.uint8), np.zeros((2, 11), dtype=np.uint8)):
        with pytest.raises(ValueError, match="outside of the levels|the same rows|whole blocks"):
            _native.look_up_levels(wrong, levels, None, out)
    for order in (np.full(12, 3, dtype=np.int32), np.full(12, -1, dtype=np.int32), np.zeros(5, dtype=np.int32)):
        with pytest.raises(ValueError, match="outside of the levels|a block for every column"):
            _native.look_up_levels(codes, levels, order, out)
