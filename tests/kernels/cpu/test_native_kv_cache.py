"""The native KV cache: what its functions do to rows and lengths, and the meaning of its quantized kinds."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from attention_cases import EPS, KINDS, SETS, make_cache, make_tokens, run_pass, run_passes

from kbit import _native
from kbit.host.errors import UnsupportedError, UsageError
from kbit.kernels import reference


def contents(cache: _native.KVCache, row: int) -> list[np.ndarray]:
    return [x for layer in range(2) for x in cache.dequantized(layer, row)]


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_select_truncate_and_grow_keep_the_tokens(kind: str) -> None:
    context = _native.Context(SETS[-1], 1)
    tokens = make_tokens((2, 1, 32), [40, 40, 40])
    cache = make_cache(tokens, kind, capacity=22)
    run_pass(context, tokens, cache, [20, 3, 17])
    before = [contents(cache, row) for row in range(3)]

    cache.grow(200)
    assert (cache.capacity, cache.batch, cache.lengths()) == (200, 3, [20, 3, 17])
    assert all(same(contents(cache, row), before[row]) for row in range(3))
    cache.grow(30)
    assert cache.capacity == 200

    cache.truncate([18, 10, 17])
    assert cache.lengths() == [18, 3, 17]
    cache.advance([2, 0, 0])
    assert same(contents(cache, 0), before[0])

    cache.select([2, 0, 0, 1])
    assert (cache.batch, cache.lengths()) == (4, [17, 20, 20, 3])
    assert all(same(contents(cache, row), before[was]) for row, was in enumerate([2, 0, 0, 1]))

    cache.select([1])
    more = make_tokens((2, 1, 32), [40])
    more.q, more.k, more.v, more.cos, more.sin = tokens.q[:1], tokens.k[:1], tokens.v[:1], tokens.cos, tokens.sin
    got = run_pass(context, more, cache, [20])[0]
    assert torch.equal(got, run_passes(context, more, kind, [[40]])[0][20:])


def test_lengths_and_room() -> None:
    cache = _native.KVCache(1, 2, 1, 16, 10, "fp16")
    assert (cache.kind, cache.capacity, cache.batch, cache.length(1)) == ("fp16", 10, 2, 0)
    cache.advance([10, 4])
    cache.reserve([0, 6])
    with pytest.raises(UsageError, match="10 tokens per row: row 1 has 4 and 7 more do not fit"):
        cache.reserve([0, 7])
    with pytest.raises(UsageError, match="row 0 has 10 and 1 more"):
        cache.advance([1, 1])
    assert cache.lengths() == [10, 4]
    with pytest.raises(UsageError, match="negative number"):
        cache.truncate([1, -1])
    with pytest.raises(UsageError, match="one number per row of the cache: 2, not 3"):
        cache.truncate([1, 1, 1])
    for rows in ([], [2], [-1]):
        with pytest.raises(UsageError, match="do not select from a cache of 2 rows"):
            cache.select(rows)
    with pytest.raises(ValueError, match="no such row"):
        cache.length(2)
    with pytest.raises(ValueError, match="no such layer or row"):
        cache.dequantized(1, 0)


def test_what_cannot_be_made_is_refused() -> None:
    with pytest.raises(UsageError, match="at least 1 row and 1 token per row, not 0 and 5"):
        _native.KVCache(1, 0, 1, 16, 5, "fp32")
    with pytest.raises(UsageError, match="not 'q4_0'"):
        _native.KVCache(1, 1, 1, 16, 5, "q4_0")
    with pytest.raises(UsageError, match="multiple of 16 features, not 20; use fp16"):
        _native.KVCache(1, 1, 1, 20, 5, "4")
    with pytest.raises(UnsupportedError, match="multiple of 16 features, not 20"):
        reference.kv_group(20)
    with pytest.raises(UsageError, match="fewer than 2\\^31 tokens"):
        _native.KVCache(1, 1, 1, 16, 2**40, "fp16")
    with pytest.raises(MemoryError):
        _native.KVCache(10**6, 10**6, 100, 128, 2**30, "fp16")


@pytest.mark.parametrize(("kind", "bits"), [("fp32", 32), ("fp16", 16), ("8", 8.5), ("4", 4.5), ("3", 3.5), ("2", 2.5)])
def test_size(kind: str, bits: float) -> None:
    """Of keys and of values: bits, and for codes half a bit for the scales of 32 features."""
    cache = _native.KVCache(3, 2, 5, 64, 160, kind)
    assert cache.nbytes == 3 * 2 * 5 * 160 * 2 * 64 * bits / 8


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_taken_when_tokens_are_written() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    cache = _native.KVCache(1, 1, 8, 128, 100_000, "fp32")
    assert cache.nbytes > 800e6
    assert resident() - before < 100e6


@pytest.mark.parametrize("group", [16, 32, 64])
def test_hadamard_is_the_orthonormal_matrix(group: int) -> None:
    index = torch.arange(group)
    common = (index[:, None] & index).tolist()
    signs = torch.tensor([[1.0 - 2.0 * (bits.bit_count() % 2) for bits in row] for row in common], dtype=torch.float64)
    x = torch.randn(5, 3, 2 * group, generator=torch.Generator().manual_seed(0))
    got = reference.hadamard(x, group)
    want = (x.double().unflatten(-1, (2, group)) @ signs * group**-0.5).flatten(-2)
    tolerance = 24 * EPS * float(x.norm(dim=-1).max())  # 16 additions, butterflies and a product, relative to the norm
    assert (got - want).abs().max() <= tolerance
    assert (reference.hadamard(got, group) - x).abs().max() <= 2 * tolerance


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_quantize_kv_takes_the_nearest_level(bits: int) -> None:
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 3, 200)[:, None]
    levels, scales = reference.quantize_kv(x, bits)
    assert (levels.dtype, scales.dtype) == (torch.int8, torch.float16)
    assert (levels.shape, scales.shape) == ((200, 64), (200, 2))
    top = 127 if bits == 8 else 2**bits - 1
    assert levels.abs().max() == top
    if bits < 8:
        assert (levels % 2 == 1).all()
    unit = scales.float().repeat_interleave(32, dim=-1)
    off = (reference.hadamard(x, 32) - levels * unit).abs() / unit
    # Half the distance of two levels; at the ends also what rounding the scale to half precision (2^-11) cut off.
    half = 0.5 if bits == 8 else 1.0
    assert off.max() <= half + (top + 1) * 2.0**-11 + 256 * 2 * EPS
    back = reference.dequantize_kv(levels, scales)
    error = (back - x).norm() / x.norm()
    # All levels of a uniform grid over the range of 32 normal values: step^2 / 12, the largest of 32 being below 4.
    assert error <= (4 / 127 if bits == 8 else 8 / 2**bits) / 12**0.5
