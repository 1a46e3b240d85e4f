"""Attention of every mask: the backends against the plain formula on odd shapes, and however the work is cut."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from attention_cases import assert_equal_to_rounding
from mask_cases import VOCABULARY, Heads, OneAttention, plain, seen_by

from kbit.backends.cpu.backend import NativeBackend
from kbit.backends.reference.backend import ReferenceBackend
from kbit.graph.batch import Batch
from kbit.graph.cache import Cache
from kbit.graph.ops import Attention
from kbit.host.errors import UsageError
from kbit.kernels import reference

pytestmark = pytest.mark.usefixtures("one_thread")

HEADS = [Heads(1, 1, 3), Heads(6, 2, 20), Heads(5, 1, 64)]
BACKENDS = ["reference", "native"]

Texts = list[list[int]]


def backend_of(name: str, threads: int = 2) -> NativeBackend | ReferenceBackend:
    return ReferenceBackend() if name == "reference" else NativeBackend(threads, compute="fp32", kv="fp32")


def texts_of(*lengths: int) -> Texts:
    random = np.random.default_rng(7)
    return [random.integers(0, VOCABULARY, length).tolist() for length in lengths]


def parts_of(heads: Heads, table: torch.Tensor, ids: list[int]) -> list[torch.Tensor]:
    """q (T, H, D), k and v (T, H_kv, D)."""
    return [x.view(len(ids), -1, heads.dim) for x in table[ids].split(heads.widths, 1)]


def check(found: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> None:
    assert_equal_to_rounding(
        found.view(q.shape), plain(q, k, v, seen).float(), q[None], k[None], v[None], q.shape[-1] ** -0.5
    )


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("name", BACKENDS)
def test_prefix_is_the_formula(name: str, heads: Heads) -> None:
    """Prefixes within and across blocks and chunks, none, and all of a text; then texts go on, each token on its own."""
    backend, table = backend_of(name), heads.table(1)
    runner = backend.bind(OneAttention(backend, heads, table, "prefix"))
    texts, prefixes = texts_of(150, 1, 300, 37), [140, 1, 17, 0]
    cache = backend.new_cache(1, len(texts), heads.kv_heads, heads.dim, 303)
    cache.reserve([len(text) for text in texts])
    found = torch.as_tensor(runner.forward(Batch.of(texts, [0] * 4, "all", prefixes), cache)).split([150, 1, 300, 37])
    for text, prefix, part in zip(texts, prefixes, found, strict=True):
        check(part, *parts_of(heads, table, text), seen_by("prefix", len(text), prefix))
    more = texts_of(3, 3, 3, 3)
    cache.reserve([3] * 4)
    found = torch.as_tensor(runner.forward(Batch.of(more, cache.lengths, "all"), cache)).split([3] * 4)
    for text, new, part in zip(texts, more, found, strict=True):
        q, k, v = parts_of(heads, table, text + new)
        check(part, q[-3:], k, v, seen_by("causal", len(q))[-3:])


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("name", BACKENDS)
def test_bidirectional_is_the_formula(name: str, heads: Heads) -> None:
    backend, table = backend_of(name), heads.table(2)
    runner = backend.bind(OneAttention(backend, heads, table, "bidirectional"))
    texts = texts_of(130, 1, 261)
    cache = backend.new_cache(1, 3, heads.kv_heads, heads.dim, 261)
    cache.reserve([len(text) for text in texts])
    found = torch.as_tensor(runner.forward(Batch.of(texts, [0] * 3, "all"), cache)).split([130, 1, 261])
    for text, part in zip(texts, found, strict=True):
        check(part, *parts_of(heads, table, text), seen_by("bidirectional", len(text)))


@pytest.mark.parametrize("stretch", [1, 64, 150])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("name", BACKENDS)
def test_stretches_are_the_formula(name: str, heads: Heads, stretch: int) -> None:
    """As long as a page, longer than a chunk of the kernels, and one token; then texts go on, into the next stretch."""
    backend, table = backend_of(name), heads.table(4)
    definition = OneAttention(backend, heads, table, "causal")
    definition.attention = replace(definition.attention, window=stretch, chunked=True)
    runner = backend.bind(definition)
    texts, lengths = texts_of(149, 1, 310, 64), [149, 1, 310, 64]
    cache = backend.new_cache(1, len(texts), heads.kv_heads, heads.dim, 313)
    cache.reserve(lengths)
    found = torch.as_tensor(runner.forward(Batch.of(texts, [0] * 4, "all"), cache)).split(lengths)
    more = texts_of(3, 3, 3, 3)
    cache.reserve([3] * 4)
    after = torch.as_tensor(runner.forward(Batch.of(more, cache.lengths, "all"), cache)).split([3] * 4)
    for text, new, *parts in zip(texts, more, found, after, strict=True):
        q, k, v = parts_of(heads, table, text + new)
        at = torch.arange(len(q))
        seen = seen_by("causal", len(q)) & (at[:, None] // stretch == at // stretch)
        check(torch.cat(parts), q, k, v, seen)


def encoded(
    backend: NativeBackend | ReferenceBackend, heads: Heads, table: torch.Tensor, sources: Texts, texts: int, room: int
) -> Cache:
    """An empty cache for texts that attend to sources."""
    encoder = backend.new_cache(1, len(sources), heads.kv_heads, heads.dim, max(map(len, sources)))
    encoder.reserve([len(source) for source in sources])
    store = backend.bind(OneAttention(backend, heads, table, "cross", "store"))
    store.forward(Batch.of(sources, [0] * len(sources)), encoder)
    pool = backend.new_cache(1, texts, heads.kv_heads, heads.dim, room)
    return Cache(pool.pool, pool.rows, room, private=True, encoder=encoder)


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("name", BACKENDS)
def test_cross_is_the_formula(name: str, heads: Heads) -> None:
    """Sources shorter and longer than what attends to them, in one pass and token by token."""
    backend, table = backend_of(name), heads.table(3)
    sources, texts = texts_of(200, 1, 33), texts_of(5, 70, 1)
    cache = encoded(backend, heads, table, sources, 3, 80)
    runner = backend.bind(OneAttention(backend, heads, table, "cross", "cross"))
    for new in (texts, texts_of(1, 1, 1)):
        counts = [len(text) for text in new]
        cache.reserve(counts)
        found = torch.as_tensor(runner.forward(Batch.of(new, cache.lengths, "all"), cache)).split(counts)
        for text, source, part in zip(new, sources, found, strict=True):
            (q, _, _), (_, k, v) = parts_of(heads, table, text), parts_of(heads, table, source)
            check(part, q, k, v, torch.ones(len(text), len(source), dtype=torch.bool))


@pytest.mark.parametrize("kv", ["fp16", "8", "4"])
def test_bits_do_not_depend_on_the_batch_or_on_threads(kv: str) -> None:
    heads, prefixes = Heads(6, 2, 32), [200, 3]
    table, texts, sources = heads.table(4), texts_of(230, 40), texts_of(260, 20)
    found = []
    for threads, alone in ((1, True), (2, False), (3, False)):
        backend = NativeBackend(threads, compute="fp32", kv=kv)
        groups = [[0], [1]] if alone else [[0, 1]]
        parts = []
        for rows in groups:
            mine = [texts[row] for row in rows]
            for mask, part in (("prefix", "self"), ("cross", "cross")):
                cache = encoded(backend, heads, table, [sources[row] for row in rows], len(rows), 230)
                runner = backend.bind(OneAttention(backend, heads, table, mask, part))
                cache.reserve([len(text) for text in mine])
                batch = Batch.of(mine, [0] * len(mine), "all", [prefixes[row] for row in rows])
                split = torch.as_tensor(runner.forward(batch, cache)).split([len(text) for text in mine])
                parts += [(mask, row, x) for row, x in zip(rows, split, strict=True)]
        found.append({(mask, row): x for mask, row, x in parts})
    for other in found[1:]:
        assert all(torch.equal(found[0][key], other[key]) for key in found[0])


@pytest.mark.parametrize("name", BACKENDS)
def test_cross_attention_wants_a_text(name: str) -> None:
    backend, heads = backend_of(name), HEADS[1]
    runner = backend.bind(OneAttention(backend, heads, heads.table(5), "cross", "cross"))
    cache = backend.new_cache(1, 2, heads.kv_heads, heads.dim, 4)
    cache.reserve([1, 1])
    with pytest.raises(UsageError, match="attends to an encoder's text, and the cache has none"):
        runner.forward(Batch.of([[1], [2]], [0, 0]), cache)
    encoder = backend.new_cache(1, 2, heads.kv_heads, heads.dim, 4)
    with pytest.raises(UsageError, match="text that has no tokens"):
        runner.forward(Batch.of([[1], []], [0, 0]), Cache(cache.pool, cache.rows, 4, encoder=encoder))
    with pytest.raises(UsageError, match="1 sequences do not go with 2 texts of an encoder"):
        Cache(cache.pool, cache.rows[:1], 4, encoder=encoder)


def test_what_an_attention_cannot_be() -> None:
    with pytest.raises(ValueError, match="the keys of causal attention are not those of source 'encoder'"):
        Attention(0, 1, 1, 8, 1.0, None, source="encoder", positions="none")
    with pytest.raises(ValueError, match="cross attention does not rotate"):
        Attention(0, 1, 1, 8, 1.0, None, mask="cross", source="encoder")
    with pytest.raises(ValueError, match="prefixes are in one batch"):
        Batch.of([[1, 2]], [0], prefixes=[3])
    with pytest.raises(ValueError, match="prefixes are in one batch"):
        Batch.of([[1, 2]], [4], prefixes=[1])


@pytest.mark.parametrize("kv", ["16", "8"])
def test_triton_runs_cross_attention(device: str, kv: str) -> None:
    """In half precision, against the formula on what the cache holds: q, k and v are rounded to fp16 on both sides."""
    pytest.importorskip("triton")
    from kbit.backends.triton.backend import TritonBackend

    heads, sources, texts = Heads(2, 1, 16), texts_of(70, 1), texts_of(3, 2)
    backend, table = TritonBackend(device, kv=kv), heads.table(6).half().float()
    cache = encoded(backend, heads, table, sources, 2, 8)
    runner = backend.bind(OneAttention(backend, heads, table, "cross", "cross"))
    for new in (texts, texts_of(1, 1)):
        counts = [len(text) for text in new]
        cache.reserve(counts)
        found = torch.as_tensor(runner.forward(Batch.of(new, cache.lengths, "all"), cache)).cpu().split(counts)
        for text, source, part in zip(new, sources, found, strict=True):
            (q, _, _), (_, k, v) = parts_of(heads, table, text), parts_of(heads, table, source)
            if kv == "8":
                k, v = (reference.dequantize_kv(*reference.quantize_kv(x, 8)) for x in (k, v))
            want = plain(q, k, v, torch.ones(len(text), len(source), dtype=torch.bool)).flatten(1)
            # Scores of factors scaled and rounded to fp16 once: each is off by 2^-11 |q| |k| at most, a weight by a
            # factor e^(2 d); weights and the result are rounded too.
            score = float(torch.einsum("thd,sgd->ths", q.abs(), k.abs()).max()) * heads.dim**-0.5
            assert (part - want).abs().max() <= (2 * score + 4) * 2.0**-11 * 2 * v.abs().max()
