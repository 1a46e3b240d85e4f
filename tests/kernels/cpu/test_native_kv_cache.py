"""The native KV cache: what its functions do to rows and lengths, and the meaning of its quantized kinds."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from attention_cases import (
    EPS,
    KINDS,
    SETS,
    dequantized,
    make_cache,
    make_tokens,
    new_cache,
    run_pass,
    run_passes,
)
from native_cases import native, source_of

from kbit import _native
from kbit.backends.cpu.kv_cache import native_pages, new_pool
from kbit.graph.block_table import BlockTable
from kbit.graph.cache import Cache
from kbit.host.errors import UnsupportedError, UsageError
from kbit.kernels import reference


def contents(cache: Cache, row: int) -> list[np.ndarray]:
    return [x for layer in range(2) for x in dequantized(cache, layer, row)]


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
    assert (cache.capacity, cache.batch, cache.lengths.tolist()) == (200, 3, [20, 3, 17])
    assert all(same(contents(cache, row), before[row]) for row in range(3))
    cache.grow(30)
    assert cache.capacity == 200

    cache.truncate([18, 10, 17])
    assert cache.lengths.tolist() == [18, 3, 17]
    cache.advance([2, 0, 0])
    assert same(contents(cache, 0), before[0])

    cache.select([2, 0, 0, 1])
    assert (cache.batch, cache.lengths.tolist()) == (4, [17, 20, 20, 3])
    assert all(same(contents(cache, row), before[was]) for row, was in enumerate([2, 0, 0, 1]))

    cache.select([1])
    more = make_tokens((2, 1, 32), [40])
    more.q, more.k, more.v, more.cos, more.sin = tokens.q[:1], tokens.k[:1], tokens.v[:1], tokens.cos, tokens.sin
    got = run_pass(context, more, cache, [20])[0]
    assert torch.equal(got, run_passes(context, more, kind, [[40]])[0][20:])


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_share_pages_go_on_each_by_itself(kind: str) -> None:
    """A row that appears twice is copied no sooner than one of both writes, and then only the page it writes to."""
    context = _native.Context(SETS[-1], 1)
    tokens = make_tokens((2, 1, 32), [150])
    cache = make_cache(tokens, kind, capacity=200)
    run_pass(context, tokens, cache, [100])
    cache.select([0, 0])
    assert cache.pool.available == cache.pool.count - 2
    other = make_tokens((2, 1, 32), [150, 150], seed=1)
    for part in ("q", "k", "v"):
        both = getattr(other, part)
        both[:, :100] = getattr(tokens, part)[:, :100]
        both[0] = getattr(tokens, part)[0]
    other.cos, other.sin = tokens.cos, tokens.sin
    got = run_pass(context, other, cache, [50, 50])
    assert cache.pool.available == cache.pool.count - 5  # the first page is common
    for row, found in enumerate(got):
        one = make_tokens((2, 1, 32), [150])
        one.q, one.k, one.v, one.cos, one.sin = (
            *(x[row : row + 1] for x in (other.q, other.k, other.v)),
            other.cos,
            other.sin,
        )
        assert torch.equal(found, run_passes(context, one, kind, [[150]])[0][100:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [32, 48])
def test_where_pages_lie_changes_no_bit(kind: str, dim: int) -> None:
    """Scattered pages against pages in order, for prompts, single tokens and windows."""
    context = _native.Context(SETS[-1], 2)
    tokens = make_tokens((2, 1, dim), [300, 300])
    for window in (0, 70):
        want = run_passes(context, tokens, kind, [[280, 150], [1, 1], [3, 2], [16, 147]], window)
        pool = new_pool(2, 1, dim, kind, 16)
        spare = [pool.take() for _ in range(16)]
        for page in np.random.default_rng(0).permutation(spare).tolist():
            pool.release(page)
        cache = Cache(pool, [BlockTable(pool), BlockTable(pool)], 300)
        parts = [run_pass(context, tokens, cache, counts, window) for counts in ([280, 150], [1, 1], [3, 2], [16, 147])]
        assert cache.tables[0, :5].tolist() != sorted(cache.tables[0, :5].tolist())
        for row in range(2):
            assert torch.equal(torch.cat([part[row] for part in parts]), want[row])


def test_lengths_and_room() -> None:
    cache = new_cache(1, 2, 1, 16, 10, "fp16")
    assert (native_pages(cache).kind, cache.capacity, cache.batch, cache.rows[1].length) == ("fp16", 10, 2, 0)
    cache.reserve([10, 4])
    cache.advance([10, 4])
    cache.reserve([0, 6])
    with pytest.raises(UsageError, match="10 tokens per row: row 1 has 4 and 7 more do not fit"):
        cache.reserve([0, 7])
    with pytest.raises(UsageError, match="row 0 has 10 and 1 more"):
        cache.reserve([1, 1])
    assert cache.lengths.tolist() == [10, 4]
    with pytest.raises(UsageError, match="negative length"):
        cache.truncate([1, -1])
    with pytest.raises(UsageError, match="one number per row of the cache: 2, not 3"):
        cache.truncate([1, 1, 1])
    for rows in ([], [2], [-1]):
        with pytest.raises(UsageError, match="do not select from a cache of 2 rows"):
            cache.select(rows)
    pages = native_pages(cache)
    for layer, table, length, part in [(1, [0], 1, "layer"), (0, [0], 65, "few pages"), (0, [2], 1, "no such page")]:
        with pytest.raises(ValueError, match=part):
            pages.dequantized(layer, np.array(table, dtype=np.int32), length)
    with pytest.raises(ValueError, match="no such page"):
        pages.copy(0, 2)


def test_what_cannot_be_made_is_refused() -> None:
    with pytest.raises(UsageError, match="at least 1 row and 1 token per row, not 0 and 5"):
        native(source_of("llama")).new_cache(0, 5)
    with pytest.raises(UsageError, match="not 'q4_0'"):
        new_cache(1, 1, 1, 16, 5, "q4_0")
    with pytest.raises(UsageError, match="multiple of 16 features, not 20; use fp16"):
        new_cache(1, 1, 1, 20, 5, "4")
    with pytest.raises(UnsupportedError, match="multiple of 16 features, not 20"):
        reference.kv_group(20)
    with pytest.raises(UsageError, match="fewer than 2\\^31 tokens"):
        native(source_of("llama")).new_cache(1, 2**40)
    with pytest.raises(MemoryError):
        new_cache(10**6, 10**6, 100, 128, 2**30, "fp16")


@pytest.mark.parametrize(("kind", "bits"), [("fp32", 32), ("fp16", 16), ("8", 8.5), ("4", 4.5), ("3", 3.5), ("2", 2.5)])
def test_size(kind: str, bits: float) -> None:
    """Of keys and of values: bits, and for codes half a bit for the scales of 32 features."""
    cache = new_cache(3, 2, 5, 64, 192, kind)
    assert cache.nbytes == 3 * 2 * 5 * 192 * 2 * 64 * bits / 8
    assert 64 * cache.nbytes == 2 * 192 * _native.kv_page_bytes(3, 5, 64, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_different_heads(kind: str) -> None:
    """Each has its own place in a page: what is written to one is what is read of it, whatever the others hold."""
    context = _native.Context(SETS[-1], 1)
    counts, dims = [2, 1, 4], [16, 512, 48]
    pages = _native.KVPages(3, counts, dims, kind, 2)
    assert pages.page_bytes == sum(
        _native.kv_page_bytes(1, count, dim, kind) for count, dim in zip(counts, dims, strict=True)
    )
    rows, tables = np.arange(70, dtype=np.int32), np.array([[1, 0]], dtype=np.int32)
    written = []
    for layer, (count, dim) in enumerate(zip(counts, dims, strict=True)):
        tokens = make_tokens((count, count, dim), [70], seed=layer)
        alone = _native.KVPages(1, count, dim, kind, 2)
        made = [
            _native.attention(
                context,
                *(x[0].contiguous().numpy() for x in (tokens.q, tokens.k, tokens.v)),
                rows,
                np.zeros_like(rows),
                tokens.cos.numpy(),
                tokens.sin.numpy(),
                cache,
                tables,
                at,
                1.0,
            )
            for cache, at in ((pages, layer), (alone, 0))
        ]
        assert np.array_equal(*made)
        written.append(alone.dequantized(0, tables[0], 70))
    for layer, expected in enumerate(written):
        assert same(list(pages.dequantized(layer, tables[0], 70)), list(expected))
    pages.resize(5)
    pages.copy(1, 4)
    assert same(list(pages.dequantized(1, np.array([4], dtype=np.int32), 64)), [x[:, :64] for x in written[1]])
    for layers, heads in ((3, [2, 1]), (2, [1, 0])):
        with pytest.raises(UsageError, match=r"the same in all layers, or of each|at least 1 layer, head and feature"):
            _native.KVPages(layers, heads, 16, kind, 1)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_taken_when_tokens_are_written() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    cache = new_cache(1, 1, 8, 128, 100_000, "fp32")
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


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_of_a_page_are_all_of_it(kind: str) -> None:
    """Loaded into a page of another cache they are the same keys and values."""
    tokens = make_tokens((2, 1, 32), [40])
    cache, other = make_cache(tokens, kind, capacity=40), make_cache(tokens, kind, capacity=40)
    run_pass(_native.Context(SETS[-1], 1), tokens, cache, [40])
    other.reserve([40])
    other.advance([40])
    assert not same(contents(cache, 0), contents(other, 0))
    (page,), (target,) = cache.rows[0].pages, other.rows[0].pages
    pages = native_pages(cache)
    data = pages.dump(page)
    assert len(data) == pages.page_bytes
    native_pages(other).load(target, data)
    assert same(contents(cache, 0), contents(other, 0))
    for wrong in (data[:-1], data + b"0", b""):
        with pytest.raises(ValueError, match="number of bytes"):
            pages.load(page, wrong)
    for nowhere in (-1, pages.count):
        with pytest.raises(ValueError, match="no such page"):
            pages.dump(nowhere)
        with pytest.raises(ValueError, match="no such page"):
            pages.load(nowhere, data)
