"""Native attention: equal to the reference to rounding, and the same bits however the work is cut."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from attention_cases import (
    EPS,
    KINDS,
    LOG2_E,
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
from kbit.kernels import reference

# H, H_kv, D. Codes need heads of a multiple of 16 features.
SHAPES = [(3, 1, 64), (4, 4, 16), (5, 1, 80), (4, 2, 128), (6, 2, 48), (2, 1, 20)]
CASES = [(kind, heads) for kind in KINDS for heads in SHAPES if not (kind.isdigit() and heads[2] % 16)]


@pytest.mark.parametrize("window", [0, 1, 9])
@pytest.mark.parametrize(("kind", "heads"), CASES, ids=str)
@pytest.mark.parametrize("isa", SETS)
def test_equals_the_reference(isa: str, kind: str, heads: tuple[int, int, int], window: int) -> None:
    dim = heads[2]
    lengths = [21, 1, 34]
    tokens = make_tokens(heads, lengths, half=dim // 4 if heads[0] == 4 else None)
    got = torch.cat(run_passes(_native.Context(isa, 1), tokens, kind, [lengths], window))

    def wanted(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        out = attend(q, k, v, lengths, scale, window)
        return torch.cat([out[b, :length] for b, length in enumerate(lengths)])

    q, k, v = rotate(tokens.q, tokens), stored(rotate(tokens.k, tokens), kind), stored(tokens.v, kind)
    scale = dim**-0.5
    exact = wanted(q, k, v, scale)
    if not kind.isdigit():
        assert_equal_to_rounding(got, exact, q, k, v, scale)
        return
    group = reference.kv_group(dim)
    rotated = reference.hadamard(k, group)
    rounded = wanted(rounded_queries(q, scale), rotated, v, math.log(2))
    assert_equal_to_rounding(got, rounded, q, k, v, scale)
    # Against unrounded queries: half a step of 1/127 of the largest in every feature, at the worst signs.
    step = reference.hadamard(q, group).unflatten(-1, (-1, group)).abs().amax(-1) / 127  # (B, T, H, groups)
    mass = rotated.unflatten(-1, (-1, group)).abs().sum(-1)  # (B, T, H_kv, groups)
    error = scale * 0.5 * float((step.flatten(0, 2).amax(0) * mass.flatten(0, 2).amax(0)).sum())
    assert (got - exact).abs().max() <= (math.exp(2 * error) - 1) * 2 * float(v.abs().max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("isa", SETS)
def test_cache_holds_what_the_reference_defines(isa: str, kind: str) -> None:
    for heads in [(3, 3, 64), (1, 1, 80), (2, 2, 16)]:
        tokens = make_tokens(heads, [37, 5])
        cache = make_cache(tokens, kind)
        run_pass(_native.Context(isa, 1), tokens, cache, [20, 5])
        run_pass(_native.Context(isa, 1), tokens, cache, [17, 0])
        keys, values = stored(rotate(tokens.k, tokens), kind), stored(tokens.v, kind)
        for b, length in enumerate(tokens.lengths):
            got_keys, got_values = (torch.from_numpy(x) for x in dequantized(cache, 1, b))
            # The same roundings in the same order up to the codes; what turns codes back may sum in another order, so
            # for codes the bound is a few units in the last place of a group's sum, far below one level.
            for got, want in [(got_keys, keys), (got_values, values)]:
                want = want[b, :length].transpose(0, 1)  # (H_kv, length, D)
                tolerance = 64 * EPS * float(want.norm(dim=-1).max()) if kind.isdigit() else 0.0
                assert (got - want).abs().max() <= tolerance
        assert not dequantized(cache, 0, 0)[0].any()  # the other layer


def lengths_for(isa: str) -> list[int]:
    """Over two chunk borders, or one where every operation is a loop in plain C++."""
    return [150, 133] if isa == "scalar" else [290, 261]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("isa", SETS)
def test_bits_do_not_depend_on_how_the_work_is_cut(isa: str, kind: str) -> None:
    first, second = lengths = lengths_for(isa)
    heads = (3, 1, 32) if isa != "scalar" else (3, 1, 16)
    tokens = make_tokens(heads, lengths)
    cuts = [
        [[first, second]],
        [[1, 1], [first - 1, second - 1]],
        [[127, 0], [2, second - 4], [first - 129, 1], [0, 3]],
        [[first - 6, second - 4], *[[1, 0]] * 2, [4, 4]],
    ]
    for window in (0, 140):
        want = run_passes(_native.Context(isa, 1), tokens, kind, cuts[0], window)
        for threads, cut in [(1, cuts[1]), (2, cuts[2]), (3, cuts[3]), (4, cuts[0]), (4, cuts[3])]:
            got = run_passes(_native.Context(isa, threads), tokens, kind, cut, window)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), (threads, cut, window)


@pytest.mark.parametrize("heads", [(9, 3, 64), (4, 4, 80), (8, 1, 16)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_token_by_token_gives_the_bits_of_one_pass(kind: str, heads: tuple[int, int, int]) -> None:
    tokens = make_tokens(heads, [43])
    want = run_passes(_native.Context(SETS[-1], 1), tokens, kind, [[43]])[0]
    for threads in (1, 2):
        assert torch.equal(run_passes(_native.Context(SETS[-1], threads), tokens, kind, [[1]] * 43)[0], want)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_does_not_notice_the_batch_it_is_in(kind: str) -> None:
    tokens = make_tokens((4, 2, 32), [40, 7, 140])
    context = _native.Context(SETS[-1], 2)
    together = run_passes(context, tokens, kind, [[30, 3, 139], [10, 4, 0], [0, 0, 1]])
    for b, length in enumerate(tokens.lengths):
        row = slice(b, b + 1)
        alone = Tokens(tokens.q[row], tokens.k[row], tokens.v[row], tokens.cos, tokens.sin, [length])
        assert torch.equal(run_passes(context, alone, kind, [[length]])[0], together[b])


@pytest.mark.parametrize("kind", KINDS)
def test_instruction_sets_give_the_same_bits(kind: str) -> None:
    tokens = make_tokens((3, 1, 64), [30])
    results = [run_passes(_native.Context(isa, 1), tokens, kind, [[29], [1]])[0] for isa in SETS]
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("window", [0, 200])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("isa", SETS)
def test_long_context(isa: str, kind: str, window: int) -> None:
    """Several chunks of slots; the results of the last tokens, split among threads, equal the reference."""
    length, heads = (300, (2, 1, 32)) if isa == "scalar" else (1000, (6, 2, 64))
    tokens = make_tokens(heads, [length])
    cache = make_cache(tokens, kind)
    context = _native.Context(isa, 3)
    before = run_pass(context, tokens, cache, [length - 3], window)[0]
    got = torch.cat([before, *(run_pass(context, tokens, cache, [n], window)[0] for n in (1, 2))])[-20:]
    q, k, v = rotate(tokens.q, tokens), stored(rotate(tokens.k, tokens), kind), stored(tokens.v, kind)
    scale = heads[2] ** -0.5
    if kind.isdigit():
        q, k, scale = rounded_queries(q, scale), reference.hadamard(k, 32), math.log(2)
    want = attend(q, k, v, [length], scale, window)[0, -20:]
    assert_equal_to_rounding(got, want, q[:, -20:], k, v, scale)


@pytest.mark.parametrize("isa", SETS)
def test_weights_are_exponentials_to_the_last_places(isa: str) -> None:
    """Two slots with scores 0 and s, and values (1, 0) and (0, 1): the ratio of the results is the weight e^s."""
    count = 200
    tokens = make_tokens((1, 1, 16), [2] * count, half=0)
    for x in (tokens.q, tokens.k, tokens.v):
        x.zero_()
    tokens.q[:, 1, 0, 0] = 1.0
    tokens.k[:, 1, 0, 0] = torch.linspace(-300, 0, count)
    tokens.v[:, 0, 0, 0] = tokens.v[:, 1, 0, 1] = 1.0
    got = torch.stack(run_passes(_native.Context(isa, 1), tokens, "fp32", [[2] * count]))[:, 1, 0]
    factor = np.float32(0.25) * np.float32(LOG2_E)  # 16^-1/2
    score = tokens.k[:, 1, 0, 0] * float(factor)  # as the kernel rounds it
    ratio = got[:, 1].double() / got[:, 0].double()
    # One unit (2 eps) of the exponential, and a division's rounding in each result.
    assert ((ratio / score.double().exp2() - 1).abs() <= 5 * EPS).all()
    assert (got[:, 2:] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("isa", SETS)
def test_extreme_scores(isa: str, kind: str) -> None:
    """Scores of +-10,000: the weights are 0 and 1, and the result is the value of one slot, to the bit for floats."""
    tokens = make_tokens((2, 1, 16), [20])
    tokens.cos.fill_(1.0)
    tokens.sin.fill_(0.0)
    tokens.q.fill_(100.0)
    tokens.k.copy_(torch.where(torch.arange(20) == 3, 100.0, -100.0)[None, :, None, None].expand_as(tokens.k))
    got = run_passes(_native.Context(isa, 1), tokens, kind, [[20]])[0]
    value = stored(tokens.v, kind)[0, 3, 0]
    assert got[:3].isfinite().all()
    tolerance = 0.0 if not kind.isdigit() else 64 * EPS * float(value.norm())  # back from the Hadamard transform
    assert (got[3:] - value).abs().max() <= tolerance


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("isa", SETS)
def test_zeros_and_sizes_at_the_edge_of_half_precision(isa: str, kind: str) -> None:
    context = _native.Context(isa, 1)
    tokens = make_tokens((2, 1, 32), [18])
    tokens.k.zero_()
    tokens.v[:, ::2] = 0.0
    # Equal scores: the mean of the values so far.
    got = run_passes(context, tokens, kind, [[18]])[0]
    values = stored(tokens.v, kind)[0, :, 0]
    mean = values.cumsum(0) / torch.arange(1, 19)[:, None]
    assert (got - mean[:, None]).abs().max() <= 2 * (18 + 40) * EPS * float(values.norm(dim=-1).max())

    sizes = torch.tensor([1e-9, 3e-7, 1e-4, 1.0, 6e4, 1e6, 1e7])  # a scale below, at and above what half precision has
    tokens = make_tokens((1, 1, 32), [7], half=0)
    tokens.v *= sizes[:, None, None]
    if kind != "fp16":  # which overflows to infinity, as the conversion does
        cache = make_cache(tokens, kind)
        run_pass(context, tokens, cache, [7])
        got = torch.from_numpy(dequantized(cache, 1, 0)[1])[0]
        want = stored(tokens.v, kind)[0, :, 0]
        assert ((got - want).norm(dim=-1) <= 64 * EPS * want.norm(dim=-1)).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("isa", SETS)
def test_leftovers_beyond_the_length_are_not_read(isa: str, kind: str) -> None:
    context = _native.Context(isa, 2)
    tokens = make_tokens((3, 1, 32), [140])
    want = run_passes(context, tokens, kind, [[138]])[0]
    for value in (torch.nan, torch.inf, None):
        spoilt = make_tokens((3, 1, 32), [140], seed=1)
        if value is not None:
            spoilt.k.fill_(value)
            spoilt.v.fill_(value)
        cache = make_cache(tokens, kind)
        run_pass(context, spoilt, cache, [140])
        cache.truncate([0])
        got = [run_pass(context, tokens, cache, [n])[0] for n in (5, 1, 131, 1)]
        assert torch.equal(torch.cat(got), want)


def test_inputs_that_do_not_fit_are_refused() -> None:
    context = _native.Context(SETS[0], 1)
    tokens = make_tokens((2, 1, 16), [4])
    arrays = [x[0].contiguous().numpy() for x in (tokens.q, tokens.k, tokens.v)]
    positions, sequence = np.arange(4, dtype=np.int32), np.zeros(4, dtype=np.int32)
    tables = [tokens.cos.numpy(), tokens.sin.numpy()]

    def call(pages: _native.KVPages, at: np.ndarray, layer: int = 0, table: tuple[int, ...] = (0,)) -> None:
        block_tables = np.array([table], dtype=np.int32)
        _native.attention(context, *arrays, at, sequence, *tables, pages, block_tables, layer, 0.25, 0)

    good = _native.KVPages(1, 1, 16, "fp32", 2)
    call(good, positions)
    for pages, at, layer, table, part in [
        (good, positions, 1, (0,), "no such layer"),
        (_native.KVPages(1, 2, 16, "fp32", 1), positions, 0, (0,), "other heads"),
        (good, positions + 61, 0, (0,), "outside the cache"),
        (good, positions, 0, (2,), "outside the cache"),
        (good, positions + 64, 0, (-1, 1), "outside the cache"),
        (good, positions[::-1].copy(), 0, (0,), "ascend"),
    ]:
        with pytest.raises(ValueError, match=part):
            call(pages, at, layer, table)
