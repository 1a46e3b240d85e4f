"""The native sampler against its meaning, `kbit.engine.sampler.Sampler`: the same tokens, on every instruction set."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from native_cases import ISAS
from numpy.typing import NDArray

from kbit import _native
from kbit.engine.cuts import block_sums, exponential
from kbit.engine.logprobs import token_infos
from kbit.engine.native_sampler import NativeSampler, sample_rows
from kbit.engine.randomness import KeyedUniform
from kbit.engine.sampler import Sampler, SamplingParams
from kbit.host.errors import KbitError

PARAMS = st.builds(
    SamplingParams,
    temperature=st.one_of(st.just(0.0), st.floats(1e-6, 3), st.sampled_from([1.0, 0.7, 1e4, 1e300])),
    top_k=st.one_of(st.just(0), st.integers(1, 5), st.integers(1, 2000)),
    top_p=st.one_of(st.just(1.0), st.floats(1e-9, 1)),
    min_p=st.one_of(st.just(0.0), st.floats(0, 1)),
    typical_p=st.one_of(st.just(1.0), st.floats(1e-9, 1)),
    repetition_penalty=st.one_of(st.just(1.0), st.floats(0.1, 5), st.sampled_from([1e300, 1e-300])),
    presence_penalty=st.one_of(st.just(0.0), st.floats(-2, 2)),
    frequency_penalty=st.one_of(st.just(0.0), st.floats(-2, 2)),
    seed=st.integers(0, 2**63 - 1),
    logit_bias=st.dictionaries(st.integers(0, 9), st.floats(-100, 100), max_size=3).map(lambda d: tuple(d.items())),
)
SIZES = st.one_of(st.integers(10, 40), st.sampled_from([255, 256, 257, 511, 512, 1000, 4097, 32_003]))
# Of trained models' kind; nearly all alike; a rounding apart; ties; far apart, and beyond what float32 has squares for; one possible.
KINDS = ("normal", "flat", "close", "ties", "wide", "huge", "one", "masked")


def some_logits(kind: str, size: int, seed: int) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal(size)
    logits = {
        "normal": 3 * noise,
        "flat": 1e-3 * noise,
        "close": 1.0 - 2.0**-24 * np.floor(np.abs(noise)),
        "ties": np.round(noise),
        "wide": 1e4 * noise,
        "huge": 3e38 * np.tanh(noise),
        "one": np.full(size, -math.inf),
        "masked": np.where(rng.random(size) < 0.8, -math.inf, noise),
    }[kind]
    logits[int(rng.integers(size))] = 1.0
    return logits.astype(np.float32)


def outcome(sampler: Sampler, logits: NDArray[np.float32]) -> int | str:
    with np.errstate(all="ignore"):
        try:
            return sampler.sample(logits)
        except KbitError as error:
            return str(error)


@settings(max_examples=150, deadline=None)
@given(PARAMS, SIZES, st.sampled_from(KINDS), st.integers(0, 1000), st.sampled_from([0, 1, 3]))
def test_the_same_tokens_as_its_meaning(params: SamplingParams, size: int, kind: str, seed: int, choice: int) -> None:
    """Four in a row, so that penalties and places count; the prompt has ids that the row has not."""
    prompt = [1, 1, 5, size + 7]
    logits = np.stack([some_logits(kind, size, seed + i) for i in range(4)])
    expected = [outcome(sampler, row) for sampler in [Sampler(params, prompt, choice)] for row in logits]
    for isa in ISAS:
        native = NativeSampler(params, prompt, choice)
        found = [sample_rows([native], logits, [row], isa=isa)[0] for row in range(4)]
        assert [token if isinstance(token, int) else str(token) for token in found] == expected


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 30.0])
def test_a_large_vocabulary(isa: str, temperature: float) -> None:
    """All cuts that look at many candidates; the hottest leaves tens of thousands in the nucleus."""
    logits = np.stack([some_logits("normal", 151_936, 0), some_logits("ties", 151_936, 1)])
    for cut in ({}, {"top_p": 0.95}, {"top_k": 40}, {"top_k": 5000, "top_p": 0.9}, {"min_p": 0.05}, {"typical_p": 0.5}):
        params = SamplingParams(temperature, seed=3, **cut)
        meaning = [Sampler(params, choice=choice) for choice in range(2)]
        natives = [NativeSampler(params, choice=choice) for choice in range(2)]
        expected = [sampler.sample(row) for sampler, row in zip(meaning, logits, strict=True)]
        assert sample_rows(natives, logits, [0, 1], isa=isa) == expected, cut


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("typical_p", [1.0, 0.5])
def test_the_largest_logit_stays_where_others_weigh_as_much(isa: str, typical_p: float) -> None:
    """What is left after top-p had not the largest in it: min-p then left none, and the native sampler read what is not
    there."""
    logits = np.full((1, 300), 1.0 - 2.0**-24, dtype=np.float32)
    logits[0, 200] = 1.0
    params = SamplingParams(100.0, top_p=1e-9, min_p=1.0, typical_p=typical_p, seed=1)
    assert Sampler(params).sample(logits[0]) == 200
    assert sample_rows([NativeSampler(params)], logits, [0], isa=isa) == [200]


def test_rows_do_not_depend_on_each_other() -> None:
    """Samplers of all kinds in one call, several of them on one row, and one whose row is broken."""
    rng = np.random.default_rng(0)
    logits = np.stack([some_logits("normal", 700, i) for i in range(5)])
    logits[3, 600] = math.nan
    base = SamplingParams(0.8, top_p=0.9, seed=5)
    params = [base, replace(base, temperature=0), replace(base, top_k=3, repetition_penalty=1.3), base, base]
    rows, masks = [4, 0, 0, 3, 2], [None, rng.random(700) < 0.5, None, None, np.arange(100) % 2 == 1]
    together = sample_rows([NativeSampler(each, [7], 1) for each in params], logits, rows, masks)
    for each, row, mask, found in zip(params, rows, masks, together, strict=True):
        seen = logits[row].copy()
        if mask is not None:
            seen[len(mask) :] = -math.inf
            seen[: len(mask)][~mask] = -math.inf
        expected = outcome(Sampler(each, [7], 1), seen)
        assert expected == (found if isinstance(found, int) else str(found))
    assert "maximum nan" in str(together[3])


@pytest.mark.parametrize(
    "values", [[1.0, math.nan, 0.0], [math.inf, 1.0], [math.inf, math.nan], [-math.inf, -math.inf], [math.nan] * 300]
)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_what_is_no_number_is_told(values: list[float], temperature: float) -> None:
    logits, params = np.array(values, np.float32), SamplingParams(temperature)
    expected = outcome(Sampler(params), logits)
    assert isinstance(expected, str)
    for isa in ISAS:
        (found,) = sample_rows([NativeSampler(params)], logits[None], [0], isa=isa)
        assert str(found) == expected
    with pytest.raises(KbitError, match="not finite"):
        NativeSampler(params).sample(logits)
    with pytest.raises(KbitError, match="not finite"):
        token_infos(logits[None], [0], [0], 1)


@settings(deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.integers(0, 2**40))
def test_keyed_numbers(seed: int, choice: int, position: int) -> None:
    assert _native.keyed_uniform(seed, choice, position) == KeyedUniform(seed, choice).at(position)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
def test_log_probabilities(isa: str, kind: str) -> None:
    logits = np.stack([some_logits(kind, 777, i) for i in range(3)])
    for top in (0, 1, 20, 777):
        infos = token_infos(logits, [2, 0], [5, 776], top, isa)
        for row, info in zip(logits[[2, 0]], infos, strict=True):
            with np.errstate(over="ignore"):
                normalizer = float(row.max()) + math.log(block_sums(exponential(row - row.max()))[-1])
            assert info.logprob == float(row[info.id]) - normalizer
            expected = np.argsort(-row.astype(np.float64), kind="stable")[:top]
            assert [token for token, _ in info.top] == expected.tolist()
            assert [value for _, value in info.top] == [float(row[i]) - normalizer for i in expected]


def test_arrays_are_checked() -> None:
    sampler, logits = NativeSampler(SamplingParams()), np.zeros((2, 8), np.float32)
    for rows in ([2], [-1], [0, 1]):
        with pytest.raises(ValueError, match="row"):
            sample_rows([sampler], logits, rows)
    with pytest.raises(ValueError, match="mask"):
        sample_rows([sampler], logits, [0], [None, None])
