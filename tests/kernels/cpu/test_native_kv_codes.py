"""Caches of codes: keys and values of different widths, and keys that are stored without the bias they all have."""

from __future__ import annotations

import math

import pytest
import torch
from attention_cases import (
    EPS,
    SETS,
    Tokens,
    assert_equal_to_rounding,
    attend,
    dequantized,
    make_cache,
    make_tokens,
    rotate,
    rounded_queries,
    run_pass,
    run_passes,
    stored,
)

from kbit import _native
from kbit.host.errors import UsageError
from kbit.kernels import reference

CODES = ["8", "4", "3", "2"]
PAIRS = [f"{keys},{values}" for keys in CODES for values in CODES if keys != values]
SHAPES = [(3, 1, 64), (4, 4, 16), (5, 1, 80), (4, 2, 48)]  # H, H_kv, D


def biased(heads: tuple[int, int, int], lengths: list[int], largest: float) -> tuple[Tokens, torch.Tensor]:
    """Tokens whose keys have a bias in them, and that: (H_kv, D). Angles ascend with positions, as those of a model."""
    dim = heads[2]
    tokens = make_tokens(heads, lengths, half=dim // 4 if heads[0] == 4 else None)
    half = tokens.cos.shape[1]
    angles = torch.arange(max(lengths))[:, None] * 100.0 ** -(torch.arange(half) / half)
    bias = largest * torch.rand(heads[1], dim, generator=torch.Generator().manual_seed(1)) - largest / 2
    return Tokens(tokens.q, tokens.k + bias, tokens.v, angles.cos(), angles.sin(), lengths), bias


def wanted_with_bias(tokens: Tokens, bias: torch.Tensor, kind: str) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values whose plain attention is what a cache of codes has to give: rounded queries meet codes,
    exact ones the bias. The halves of the features are the two sums of a score; values are followed by zeros.
    """
    dim = tokens.q.shape[-1]
    scale = dim**-0.5
    group = reference.kv_group(dim)
    q = rotate(tokens.q, tokens)
    rest = stored(rotate(tokens.k - bias, tokens), kind)
    turned = rotate(bias.expand(tokens.k.shape), tokens)
    both = torch.cat([rounded_queries(q, scale), q * (scale / math.log(2))], -1)
    keys = torch.cat([reference.hadamard(rest, group), turned], -1)
    values = stored(tokens.v, kind)
    return both, keys, torch.cat([values, torch.zeros_like(values)], -1)


@pytest.mark.parametrize("window", [0, 9])
@pytest.mark.parametrize("kind", CODES)
@pytest.mark.parametrize("heads", SHAPES, ids=str)
@pytest.mark.parametrize("isa", SETS)
def test_keys_without_their_bias_equal_the_reference(
    isa: str, heads: tuple[int, int, int], kind: str, window: int
) -> None:
    lengths = [21, 1, 34]
    tokens, bias = biased(heads, lengths, 40.0)
    got = torch.cat(run_passes(_native.Context(isa, 1), tokens, kind, [lengths], window, bias))
    q, k, v = wanted_with_bias(tokens, bias, kind)
    out = attend(q, k, v, lengths, math.log(2), window)[..., : heads[2]]
    want = torch.cat([out[b, :length] for b, length in enumerate(lengths)])
    assert_equal_to_rounding(got, want, q, k, v, math.log(2))


@pytest.mark.parametrize("kind", CODES)
@pytest.mark.parametrize("isa", SETS)
def test_the_cache_holds_what_is_left_of_keys(isa: str, kind: str) -> None:
    tokens, bias = biased((3, 3, 64), [37], 300.0)
    cache = make_cache(tokens, kind)
    run_pass(_native.Context(isa, 1), tokens, cache, [37], key_bias=bias)
    got = torch.from_numpy(dequantized(cache, 1, 0)[0])
    rest = stored(rotate(tokens.k - bias, tokens), kind)[0].transpose(0, 1)
    assert (got - rest).abs().max() <= 64 * EPS * float(rest.norm(dim=-1).max())
    seen = reference.cached_keys(tokens.k, tokens.cos[None], tokens.sin[None], int(kind), bias)[0].transpose(0, 1)
    turned = rotate(bias.expand(tokens.k.shape), tokens)[0].transpose(0, 1)
    assert (got + turned - seen).abs().max() <= 64 * EPS * float(seen.norm(dim=-1).max())


@pytest.mark.parametrize("kind", ["8", "4", "4,2"])
@pytest.mark.parametrize("isa", SETS)
def test_bits_with_a_bias_do_not_depend_on_how_the_work_is_cut(isa: str, kind: str) -> None:
    lengths = [150, 133] if isa == "scalar" else [290, 261]
    tokens, bias = biased((3, 1, 32), lengths, 40.0)
    first, second = lengths
    cuts = [[[1, 1], [first - 1, second - 1]], [[127, 0], [2, second - 4], [first - 129, 1], [0, 3]]]
    for window in (0, 140):
        want = run_passes(_native.Context(isa, 1), tokens, kind, [lengths], window, bias)
        for threads, cut in [(1, cuts[0]), (2, cuts[1]), (3, [lengths])]:
            got = run_passes(_native.Context(isa, threads), tokens, kind, cut, window, bias)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), (threads, cut, window)


@pytest.mark.parametrize("kind", CODES)
def test_a_large_bias_costs_nothing(kind: str) -> None:
    """Keys with a bias of 300 in the slowest pairs, which adds nearly the same to every score."""
    heads = (6, 2, 64)
    tokens, _ = biased(heads, [200], 0.0)
    tokens.cos[:, -4:], tokens.sin[:, -4:] = 1.0, 0.0
    bias = torch.zeros(2, 64)
    bias[:, 28:32], bias[:, 60:] = 300.0, -300.0
    context = _native.Context(SETS[-1], 1)
    plain = run_passes(context, tokens, kind, [[200]])[0]
    tokens.k += bias
    exact = run_passes(context, tokens, "fp32", [[200]])[0]
    without = run_passes(context, tokens, kind, [[200]], key_bias=bias)[0]
    within = run_passes(context, tokens, kind, [[200]])[0]
    loss = float((plain - exact).norm())
    assert float((without - exact).norm()) <= 1.01 * loss + 1e-3
    assert float((within - exact).norm()) >= 2 * loss


def test_tables_that_do_not_fit_a_bias_are_refused() -> None:
    tokens, bias = biased((2, 1, 16), [4], 1.0)
    context = _native.Context(SETS[0], 1)
    with pytest.raises(ValueError, match=r"a key bias \(H_kv D\) comes with tables by position"):
        run_pass(context, tokens, make_cache(tokens, "4"), [4], key_bias=bias[:, :8])
    short = Tokens(tokens.q, tokens.k, tokens.v, tokens.cos[:2], tokens.sin[:2], [4])
    with pytest.raises(ValueError, match="tables by position"):
        run_pass(context, short, make_cache(tokens, "4"), [4], key_bias=bias)


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("isa", SETS)
def test_widths_apart_equal_the_reference(isa: str, kind: str) -> None:
    for heads in SHAPES:
        lengths = [21, 1, 34]
        tokens = make_tokens(heads, lengths)
        got = torch.cat(run_passes(_native.Context(isa, 1), tokens, kind, [[20, 1, 30], [1, 0, 3], [0, 0, 1]]))
        k_kind, v_kind = kind.split(",")
        k = reference.hadamard(stored(rotate(tokens.k, tokens), k_kind), reference.kv_group(heads[2]))
        v = stored(tokens.v, v_kind)
        q = rounded_queries(rotate(tokens.q, tokens), heads[2] ** -0.5)
        out = attend(q, k, v, lengths, math.log(2), 0)
        parts = [out[b, :length] for b, length in enumerate(lengths)]
        assert_equal_to_rounding(got, torch.cat(parts), q, k, v, math.log(2))


def test_bytes_of_widths_apart_are_those_of_their_halves() -> None:
    def bytes_of(kind: str) -> int:
        return _native.kv_page_bytes(2, 3, 64, kind)

    for keys in CODES:
        for values in CODES:
            assert 2 * bytes_of(f"{keys},{values}") == bytes_of(keys) + bytes_of(values)
    for kind in ("8,", ",8", "8,5", "16,8", "fp16,4", "8,4,2", "84"):
        with pytest.raises(UsageError, match="fp32, fp16, or of 8, 4, 3 or 2 bits"):
            bytes_of(kind)


@pytest.mark.parametrize("dim", [16, 32, 48, 64, 80])
def test_quantize_kv_4_takes_the_scale_of_least_error(dim: int) -> None:
    x = torch.randn(64, dim, generator=torch.Generator().manual_seed(dim))
    group = reference.kv_group(dim)
    levels, scales = reference.quantize_kv_4(x)
    assert set(levels.unique().tolist()) <= set(reference.LEVELS_4)
    rotated = reference.hadamard(x, group).view(64, -1, group)
    largest = rotated.gather(-1, rotated.abs().argmax(-1, keepdim=True))[..., 0]
    table = torch.tensor(reference.LEVELS_4, dtype=torch.float32)

    def error(scale: torch.Tensor) -> torch.Tensor:
        """Every value at the level nearest to its whole number of scales."""
        divisor = scale.float()[..., None]
        levels = (rotated / divisor).clamp(-127, 127).round()[..., None]
        nearest = table[(levels - table).abs().argmin(-1)]
        return (nearest * divisor - rotated).square().sum(-1)

    candidates = [(sign * shrink / 111.43 * largest).half() for shrink in reference.SHRINKS_4 for sign in (-1, 1)]
    assert torch.stack([scales == candidate for candidate in candidates]).any(0).all()
    least = torch.stack([error(candidate) for candidate in candidates]).amin(0)
    kept = levels.view(64, -1, group) * scales.float()[..., None]
    assert ((kept - rotated).square().sum(-1) - least).abs().max() <= 1e-5 * float(least.max())


def test_four_bits_have_a_quarter_less_error_than_equal_steps() -> None:
    x = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0))
    ours, equal = (
        float((reference.dequantize_kv(*codes) - x).square().mean())
        for codes in (reference.quantize_kv_4(x), reference.quantize_kv(x, 4))
    )
    assert ours <= 0.73 * equal
    for size in (0.0, 1e-9, 3e-7, 6e4, 1e7):
        kept = reference.dequantize_kv(*reference.quantize_kv_4(size * x[:20]))
        assert kept.isfinite().all()
        if 1e-3 < size < 1e5:
            assert float((kept - size * x[:20]).square().mean()) <= 0.0065 * size**2
