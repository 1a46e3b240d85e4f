"""Attention over a native cache as its tests set it up, and what the reference makes of the same tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from kbit import _native
from kbit.backends.cpu.kv_cache import native_pages, new_pool
from kbit.graph.cache import Cache
from kbit.graph.pages import pages_for
from kbit.kernels import reference

SETS = _native.instruction_sets()
KINDS = ["fp32", "fp16", "8", "4", "3", "2"]
EPS = 2.0**-24  # half a unit in the last place of 1
LOG2_E = 1.44269504088896341


@dataclass
class Tokens:
    """Queries, keys and values of a batch of sequences that may differ in length: (B, T, heads, D), T the longest."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cos: torch.Tensor  # (T, half), by position
    sin: torch.Tensor
    lengths: list[int]


def make_tokens(heads: tuple[int, int, int], lengths: list[int], seed: int = 0, half: int | None = None) -> Tokens:
    """heads: (H, H_kv, D). half: rotated pairs, D / 2 unless given."""
    count, kv_heads, dim = heads
    half = dim // 2 if half is None else half
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))
    q = torch.randn(*shape, count, dim, generator=generator)
    k = torch.randn(*shape, kv_heads, dim, generator=generator)
    v = torch.randn(*shape, kv_heads, dim, generator=generator)
    angles = 6 * torch.rand(max(lengths), half, generator=generator)
    return Tokens(q, k, v, angles.cos(), angles.sin(), lengths)


def new_cache(layers: int, batch: int, kv_heads: int, dim: int, capacity: int, kind: str) -> Cache:
    return Cache.alone(new_pool(layers, kv_heads, dim, kind, batch * pages_for(capacity)), batch, capacity)


def make_cache(tokens: Tokens, kind: str, capacity: int | None = None) -> Cache:
    """Two layers; the tests use the second."""
    batch, longest, kv_heads, dim = tokens.k.shape
    return new_cache(2, batch, kv_heads, dim, capacity or longest, kind)


def dequantized(cache: Cache, layer: int, row: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values of a row as attention understands them: (H_kv, length, D) each."""
    return native_pages(cache).dequantized(layer, cache.tables[row], cache.rows[row].length)


def run_pass(
    context: _native.Context,
    tokens: Tokens,
    cache: Cache,
    counts: list[int],
    window: int = 0,
    key_bias: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """The next counts[b] tokens of every sequence in one pass -> per sequence (counts[b], H, D).

    key_bias: (H_kv, D), what the keys of `tokens` have in them.
    """
    starts = cache.lengths.tolist()
    rows = [(b, t) for b, n in enumerate(counts) for t in range(starts[b], starts[b] + n)]
    sequence, positions = (np.array(column, dtype=np.int32) for column in zip(*rows, strict=True))
    cache.reserve(counts)
    scale = tokens.q.shape[-1] ** -0.5
    tables = [x if key_bias is not None else x[positions.tolist()] for x in (tokens.cos, tokens.sin)]
    out = _native.attention(
        context,
        *(x[sequence.tolist(), positions.tolist()].contiguous().numpy() for x in (tokens.q, tokens.k, tokens.v)),
        positions,
        sequence,
        *(x.contiguous().numpy() for x in tables),
        native_pages(cache),
        cache.tables,
        1,
        scale,
        window,
        None if key_bias is None else key_bias.flatten().numpy(),
    )
    cache.advance(counts)
    return list(torch.from_numpy(out).split(counts))


def run_passes(
    context: _native.Context,
    tokens: Tokens,
    kind: str,
    passes: list[list[int]],
    window: int = 0,
    key_bias: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """Several passes over a fresh cache -> per sequence all its results, (length, H, D)."""
    cache = make_cache(tokens, kind)
    parts = [run_pass(context, tokens, cache, counts, window, key_bias) for counts in passes]
    return [torch.cat(pieces) for pieces in zip(*parts, strict=True)]


def rotate(x: torch.Tensor, tokens: Tokens) -> torch.Tensor:
    batch = x.shape[0]
    return reference.rope(x, tokens.cos.expand(batch, -1, -1), tokens.sin.expand(batch, -1, -1))


def stored(x: torch.Tensor, kind: str) -> torch.Tensor:
    """What a cache of this kind makes of rotated keys, or of values."""
    if kind == "fp32":
        return x
    if kind == "fp16":
        return x.half().float()
    return reference.dequantize_kv(
        *(reference.quantize_kv_4(x) if kind == "4" else reference.quantize_kv(x, int(kind)))
    )


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int], scale: float, window: int
) -> torch.Tensor:
    positions = torch.arange(q.shape[1]).expand(q.shape[0], -1)
    return reference.attend(
        q, k.transpose(1, 2), v.transpose(1, 2), positions, torch.tensor(lengths), scale, window or None
    )


def rounded_queries(q: torch.Tensor, scale: float) -> torch.Tensor:
    """Queries as scores against codes take them: times scale and log2(e), through the Hadamard transform, int8 by
    groups. Each step is one rounding on both sides, so the codes are the same. (B, T, H, D), in the rotated space.
    """
    factor = np.float32(scale) * np.float32(LOG2_E)
    group = reference.kv_group(q.shape[-1])
    x = reference.hadamard(q * float(factor), group).unflatten(-1, (-1, group))
    largest = x.abs().amax(-1, keepdim=True)
    codes = (x * (torch.tensor(127.0) / largest)).round()
    return (codes * (largest / 127)).flatten(-2)


def assert_equal_to_rounding(
    got: torch.Tensor, want: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> None:
    """Two fp32 evaluations of attention over q (B, T, H, D), k and v (B, S, H_kv, D).

    A score is a sum of D products of factors with a few roundings each: off by d = (D + 8) eps scale |q|.|k| at most.
    That changes weights by a factor e^(+-2 d); their sum and the weighted sum of values have S terms, and each weight
    is good to a few units in the last place: so weights are off by 2 d + (2 S + 40) eps in all, on both sides, and
    multiply differences of values. On average roundings are independent, and sums of n of them grow as sqrt(n): the
    root of the mean square error is within 4 standard deviations of that.
    """
    slots, dim = k.shape[1], q.shape[-1]
    grouped = q.abs().unflatten(2, (k.shape[2], -1))  # (B, T, H_kv, G, D)
    score = scale * float(torch.einsum("bthgd,bshd->bthgs", grouped, k.abs()).max())
    worst = 2 * (dim + 8) * score + 2 * slots + 40
    assert (got - want).abs().max() <= 2 * EPS * worst * 2 * float(v.abs().max())
    typical = dim**0.5 * score + slots**0.5 + 8
    assert (got - want).square().mean().sqrt() <= 4 * EPS * typical * float(v.square().mean().sqrt())
