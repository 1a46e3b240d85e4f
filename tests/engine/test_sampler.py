"""Sampling against transformers' logits processors, and the drawn tokens against the distribution they should have."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kbit.engine.cuts import exponential, keep_min_p, keep_top_k, keep_top_p, keep_typical
from kbit.engine.sampler import Sampler, SamplingParams, repetition_penalty
from kbit.host.errors import KbitError, UsageError

V = 200


def random_logits(seed: int, size: int = V, spread: float = 3.0) -> torch.Tensor:
    return spread * torch.randn(size, generator=torch.Generator().manual_seed(seed))


def only(logits: torch.Tensor, kept: npt.NDArray[np.int64]) -> torch.Tensor:
    """Logits (V,) with all but those at `kept` (n,) set to -inf, which is how transformers writes a cut."""
    cut = torch.full_like(logits, -math.inf)
    cut[kept] = logits[kept]
    return cut


def warped(logits: torch.Tensor, *processors: Any, ids: list[int] | None = None) -> torch.Tensor:
    """transformers' processors applied in order: (V,) -> (V,)."""
    scores = logits[None]
    for processor in processors:
        scores = processor(torch.tensor([ids or [0]]), scores)
    return scores[0]


class TestAgainstTransformers:
    @pytest.mark.parametrize("seed", range(5))
    @pytest.mark.parametrize("k", [1, 2, 50, V, V + 5])
    def test_top_k(self, seed: int, k: int) -> None:
        from transformers import TopKLogitsWarper

        logits = random_logits(seed)
        assert torch.equal(only(logits, keep_top_k(logits.numpy(), k)), warped(logits, TopKLogitsWarper(k)))

    @pytest.mark.parametrize("spread", [0.01, 1.0, 3.0, 30.0])
    @pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.95, 0.999])
    def test_top_p(self, spread: float, p: float) -> None:
        from transformers import TopPLogitsWarper

        for seed in range(5):
            logits = random_logits(seed, spread=spread)
            assert torch.equal(only(logits, keep_top_p(logits.numpy(), p)), warped(logits, TopPLogitsWarper(p)))

    @pytest.mark.parametrize("p", [0.001, 0.05, 0.5, 1.0])
    def test_min_p(self, p: float) -> None:
        from transformers import MinPLogitsWarper

        for seed in range(5):
            logits = random_logits(seed)
            assert torch.equal(only(logits, keep_min_p(logits.numpy(), p)), warped(logits, MinPLogitsWarper(p)))

    @pytest.mark.parametrize("p", [1e-6, 0.2, 0.5, 0.95])
    def test_typical(self, p: float) -> None:
        from transformers import TypicalLogitsWarper

        for seed in range(5):
            logits = random_logits(seed)
            assert torch.equal(only(logits, keep_typical(logits.numpy(), p)), warped(logits, TypicalLogitsWarper(p)))

    @pytest.mark.parametrize("penalty", [0.5, 1.1, 2.0])
    def test_repetition_penalty(self, penalty: float) -> None:
        from transformers import RepetitionPenaltyLogitsProcessor

        logits, ids = random_logits(1), [3, 3, 7, 190, 0]
        ours = logits.clone()
        repetition_penalty(ours.numpy(), np.array(sorted(set(ids))), penalty)
        assert torch.equal(ours, warped(logits, RepetitionPenaltyLogitsProcessor(penalty), ids=ids))

    @pytest.mark.parametrize(
        ("temperature", "k", "p", "m", "r"),
        [(0.7, 20, 0.9, 0.05, 1.2), (2.0, 0, 0.8, 0.0, 1.0), (0.3, 50, 1.0, 0.2, 1.5), (1.0, 5, 0.5, 0.0, 0.8)],
    )
    def test_all_together_have_the_same_distribution(
        self, temperature: float, k: int, p: float, m: float, r: float
    ) -> None:
        """The order of operations: the tokens drawn follow the distribution transformers' chain leaves. Each token in
        it is at least 1e-3 probable (checked), so it is expected 5 times or more, as Pearson's test wants."""
        from transformers import (
            MinPLogitsWarper,
            RepetitionPenaltyLogitsProcessor,
            TemperatureLogitsWarper,
            TopKLogitsWarper,
            TopPLogitsWarper,
        )

        logits, prompt = random_logits(4, size=60, spread=2.0), [5, 9, 9, 33]
        chain = [RepetitionPenaltyLogitsProcessor(r), TemperatureLogitsWarper(temperature)]
        chain += [TopKLogitsWarper(k)] if k else []
        chain += [TopPLogitsWarper(p)] if p < 1 else []
        chain += [MinPLogitsWarper(m)] if m else []
        expected = warped(logits, *chain, ids=prompt).softmax(0)
        assert expected[expected > 0].min() > 1e-3
        params = SamplingParams(temperature, k, p, m, repetition_penalty=r, seed=0)
        counts = draws(params, logits, 5_000, prompt)
        assert_chi_square(counts, expected)


def draws(params: SamplingParams, logits: torch.Tensor, n: int, prompt: list[int] | None = None) -> torch.Tensor:
    """Counts (V,) of n independent draws: the sampler's memory of its own tokens is wiped between them."""
    sampler = Sampler(params, prompt or ())
    counts = torch.zeros(logits.numel(), dtype=torch.int64)
    for _ in range(n):
        counts[sampler.sample(logits)] += 1
        sampler._seen = set(prompt or ())
        sampler._generated.clear()
    return counts


def assert_chi_square(counts: torch.Tensor, expected: torch.Tensor) -> None:
    """Pearson's test at level 1e-6; tokens of probability 0 must not occur at all."""
    kept = expected > 0
    assert counts[~kept].sum() == 0
    wanted = expected[kept].double() * counts.sum()
    statistic = ((counts[kept] - wanted) ** 2 / wanted).sum()
    freedom = int(kept.sum()) - 1
    if freedom:
        # Survival function of chi-square: the regularised upper incomplete gamma function.
        p_value = torch.special.gammaincc(torch.tensor(freedom / 2, dtype=torch.float64), statistic / 2)
        assert p_value > 1e-6, f"p = {p_value:.2e} with {freedom} degrees of freedom"


class TestDraws:
    def test_weights_are_exponentials(self) -> None:
        scores = -np.geomspace(1e-8, 59.9, 20_001, dtype=np.float32)
        exact = np.exp(scores.astype(np.float64))
        bound = (3 - scores / 2) * np.finfo(np.float32).eps * exact + np.exp(-60)
        assert (np.abs(exponential(scores) - exact) <= bound).all()
        assert exponential(np.float32([0, -60, -1e9, -math.inf])).tolist() == [1, 0, 0, 0]

    @pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
    def test_distribution(self, temperature: float) -> None:
        logits = torch.tensor([1.0, 0.0, -1.0, 2.0, -math.inf, 0.5])
        counts = draws(SamplingParams(temperature, seed=1), logits, 20_000)
        assert_chi_square(counts, (logits / temperature).softmax(0))

    def test_the_test_notices_a_wrong_temperature(self) -> None:
        logits = torch.tensor([1.0, 0.0, -1.0, 2.0, -math.inf, 0.5])
        counts = draws(SamplingParams(1.1, seed=1), logits, 20_000)
        with pytest.raises(AssertionError, match="p ="):
            assert_chi_square(counts, logits.softmax(0))

    def test_seed_decides_and_nothing_else(self) -> None:
        logits = random_logits(0)
        params = SamplingParams(1.0, seed=7)

        def tokens(before: int) -> list[int]:
            torch.manual_seed(before)
            sampler = Sampler(params)
            found = []
            for _ in range(20):
                found.append(sampler.sample(logits))
                torch.rand(before + 1)  # someone else draws from the global generator
            return found

        state = torch.get_rng_state()
        assert tokens(0) == tokens(5)
        assert tokens(0) != [Sampler(SamplingParams(1.0, seed=8)).sample(logits) for _ in range(20)]
        torch.set_rng_state(state)
        Sampler(params).sample(logits)
        assert torch.equal(torch.get_rng_state(), state)  # and the global generator is left alone

    def test_fresh_seed_is_reported_and_repeats(self) -> None:
        logits = random_logits(0)
        first, second = Sampler(SamplingParams(1.0)), Sampler(SamplingParams(1.0))
        assert first.seed != second.seed  # equal with probability 2^-63
        again = Sampler(SamplingParams(1.0, seed=first.seed))
        assert [first.sample(logits) for _ in range(20)] == [again.sample(logits) for _ in range(20)]

    def test_padding_the_vocabulary_changes_nothing(self) -> None:
        """One uniform number per token: columns no token has must not shift the random numbers."""
        logits = random_logits(2)
        padded = torch.cat([logits, torch.full((56,), -math.inf)])
        a, b = (Sampler(SamplingParams(1.0, seed=3)) for _ in range(2))
        assert [a.sample(logits) for _ in range(50)] == [b.sample(padded) for _ in range(50)]

    def test_greedy(self) -> None:
        sampler = Sampler(SamplingParams())
        for seed in range(20):
            logits = random_logits(seed)
            assert sampler.sample(logits) == int(logits.argmax())

    @pytest.mark.parametrize(("u", "expected"), [(0.0, 1), (1 - 2**-53, 3)])
    def test_ends_of_the_unit_interval(self, u: float, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """The smallest and largest uniform numbers there are: neither picks an impossible token."""
        monkeypatch.setattr(Sampler, "_uniform", lambda self, *_: u)
        logits = torch.tensor([-math.inf, 0.3, 0.1, -0.2, -math.inf])
        assert Sampler(SamplingParams(1.0, seed=0)).sample(logits) == expected

    @pytest.mark.parametrize("size", [1, 255, 256, 257, 1000])
    def test_large_vocabularies_are_drawn_from_in_blocks(self, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """The same token as a running sum over everything gives, also where a block ends or is empty. Weights are whole
        numbers, so every order of adding them up gives the same sums."""
        generator = np.random.default_rng(size)
        weights = generator.integers(0, 4, size).astype(np.float32)
        weights[256:512] = 0
        weights[0] = 1
        total, sampler = int(weights.sum()), Sampler(SamplingParams(1.0, seed=0))
        expected = np.repeat(np.arange(size), weights.astype(int))
        for unit in range(total):
            for u in (unit / total, (unit + 0.5) / total):
                monkeypatch.setattr(sampler, "_uniform", lambda *_, u=u: u)
                # u * total may round to just below a whole number.
                assert sampler._draw(None, weights) == expected[math.floor(u * total)]

    def test_tiny_temperature_is_greedy_and_finite(self) -> None:
        for seed in range(20):
            logits = random_logits(seed, spread=100.0)
            assert Sampler(SamplingParams(1e-6, seed=seed)).sample(logits) == int(logits.argmax())

    @settings(max_examples=200, deadline=None)
    @given(
        values=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=12),
        temperature=st.floats(1e-6, 1e6),
        k=st.integers(0, 15),
        p=st.floats(1e-9, 1.0),
        m=st.floats(0.0, 1.0),
    )
    def test_always_a_token_that_was_possible(
        self, values: list[float], temperature: float, k: int, p: float, m: float
    ) -> None:
        """Extreme and tied logits, all filters at once: the token is among the k largest, and no filter empties the
        set."""
        logits = torch.tensor(values, dtype=torch.float32)
        token = Sampler(SamplingParams(temperature, k, p, m, seed=0)).sample(logits)
        assert 0 <= token < len(values)
        if k:
            assert logits[token] >= logits.sort(descending=True).values[min(k, len(values)) - 1]


class TestPenalties:
    def test_presence_and_frequency(self) -> None:
        """logit - frequency * count - presence * (count > 0), the OpenAI API's formula; the prompt does not count."""
        sampler = Sampler(SamplingParams(presence_penalty=0.5, frequency_penalty=0.2), prompt_ids=[2])
        logits = torch.tensor([1.0, 0.9, 0.85])
        # 0 is best; then 1.0 - 0.7 = 0.3; 1: 0.9 - 0.7 = 0.2; 2: 0.85 - 0.7 = 0.15; then 0.3 - 0.2 = 0.1, ...
        assert [sampler.sample(logits) for _ in range(6)] == [0, 1, 2, 0, 1, 2]
        assert np.allclose(sampler._penalise(logits.numpy()), [0.1, 0.0, -0.05], atol=1e-6)

    def test_repetition_counts_prompt_and_answer(self) -> None:
        sampler = Sampler(SamplingParams(repetition_penalty=2.0), prompt_ids=[0, 10_000])
        logits = torch.tensor([3.0, 2.0, 1.6, -1.0])
        assert [sampler.sample(logits) for _ in range(3)] == [1, 2, 0]
        assert np.array_equal(sampler._penalise(logits.numpy()), np.float32([1.5, 1.0, 0.8, -1.0]))

    def test_logits_are_not_changed(self) -> None:
        logits = random_logits(0)
        before = logits.clone()
        sampler = Sampler(SamplingParams(0.5, 5, 0.5, 0.1, 1.3, 0.1, 0.1, seed=0), prompt_ids=range(20))
        for _ in range(5):
            sampler.sample(logits)
        assert torch.equal(logits, before)


class TestErrors:
    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ([1.0, math.nan, 0.0], "not finite"),
            ([1.0, math.inf, 0.0], "not finite"),
            ([-math.inf, -math.inf], "not finite"),
        ],
    )
    @pytest.mark.parametrize("temperature", [0.0, 0.8])
    def test_logits_not_finite(self, values: list[float], message: str, temperature: float) -> None:
        with pytest.raises(KbitError, match=message):
            Sampler(SamplingParams(temperature)).sample(torch.tensor(values))

    @pytest.mark.parametrize(
        ("name", "value", "flag"),
        [
            ("temperature", -1.0, "--temperature -1.0"),
            ("temperature", math.nan, "--temperature nan"),
            ("temperature", math.inf, "--temperature inf"),
            ("temperature", 1e-9, "--temperature 1e-09"),
            ("top_k", -1, "--top-k -1"),
            ("top_p", 0.0, "--top-p 0.0"),
            ("top_p", 1.5, "--top-p 1.5"),
            ("top_p", math.nan, "--top-p nan"),
            ("min_p", -0.1, "--min-p -0.1"),
            ("min_p", 1.1, "--min-p 1.1"),
            ("repetition_penalty", 0.0, "--repetition-penalty 0.0"),
            ("repetition_penalty", math.inf, "--repetition-penalty inf"),
            ("presence_penalty", math.nan, "--presence-penalty nan"),
            ("frequency_penalty", math.inf, "--frequency-penalty inf"),
            ("seed", -1, "--seed -1"),
            ("seed", 2**63, f"--seed {2**63}"),
        ],
    )
    def test_params_out_of_range(self, name: str, value: float, flag: str) -> None:
        with pytest.raises(UsageError) as caught:
            SamplingParams(**{name: value})
        assert str(caught.value).startswith(f"{flag}: expected ")
