"""From logits to the next token.

Order of operations, that of transformers (`GenerationMixin._get_logits_processor`), so that the same settings mean the
same distribution there and here:

1. repetition penalty (prompt and generated tokens), then frequency and presence penalty (generated tokens only);
2. temperature;
3. top-k, top-p, min-p, each on what the one before it left.

Penalties come first because they change what the model says about a token, and everything after cuts a distribution.
Temperature comes before the cuts: top-p and min-p then speak about the distribution that is drawn from. Temperature 0
takes the largest penalised logit. transformers has no presence and frequency penalty; these follow the definition of
the OpenAI API, which vLLM shares.
"""

from __future__ import annotations

import math
import secrets
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from kbit.errors import KbitError, UsageError

# Below this a temperature is indistinguishable from greedy decoding, and logits divided by it can leave float32.
MIN_TEMPERATURE = 1e-6


@dataclass(frozen=True)
class SamplingParams:
    """How to choose the next token. The defaults are greedy decoding.

    Attributes:
        temperature: logits are divided by it; 0 is greedy.
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: keep the smallest set of most probable tokens whose probabilities reach this sum (Holtzman et al. 2020).
        min_p: keep tokens at least this fraction as probable as the most probable one (Nguyen et al. 2024).
        repetition_penalty: divides positive and multiplies negative logits of tokens seen in prompt or answer
            (Keskar et al. 2019, CTRL); 1 is none.
        presence_penalty: subtracted from the logits of tokens generated at least once; 0 is none.
        frequency_penalty: subtracted once for every time a token was generated; 0 is none.
        seed: of the random generator; None draws a fresh one.

    Raises:
        UsageError: a value is out of range; the message names the command line's flag.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        t = self.temperature
        _require(t == 0 or MIN_TEMPERATURE <= t < math.inf, "--temperature", t, "0 (greedy) or a number from 1e-6 up")
        _require(self.top_k >= 0, "--top-k", self.top_k, "a whole number of tokens to keep, or 0 for all")
        _require(0 < self.top_p <= 1, "--top-p", self.top_p, "a probability above 0 and at most 1 (1 keeps all)")
        _require(0 <= self.min_p <= 1, "--min-p", self.min_p, "a fraction from 0 (keeps all) to 1")
        r = self.repetition_penalty
        _require(0 < r < math.inf, "--repetition-penalty", r, "a number above 0 (1 is none, 1.1 is usual)")
        for flag, value in (
            ("--presence-penalty", self.presence_penalty),
            ("--frequency-penalty", self.frequency_penalty),
        ):
            _require(math.isfinite(value), flag, value, "a finite number (0 is none, up to 2 is usual)")
        if self.seed is not None:
            _require(0 <= self.seed < 2**63, "--seed", self.seed, "a whole number from 0 to 2**63 - 1")


def _require(good: bool, flag: str, value: float, expected: str) -> None:
    if not good:
        raise UsageError(f"{flag} {value}: expected {expected}")


class Sampler:
    """Draws the tokens of one request and remembers them for the penalties.

    Sampling runs on the CPU with a generator of its own: neither the global random state nor the device the logits
    come from changes what a seed gives. One uniform number is spent per token, whatever the vocabulary.

    Args:
        params: how to choose.
        prompt_ids: the prompt, which the repetition penalty counts as seen.

    Attributes:
        seed: the seed in use, also when params.seed was None.
    """

    def __init__(self, params: SamplingParams, prompt_ids: Iterable[int] = ()) -> None:
        self.params = params
        self.seed = secrets.randbits(63) if params.seed is None else params.seed
        self._generator = torch.Generator(device="cpu").manual_seed(self.seed)
        self._seen = set(prompt_ids)
        self._generated: Counter[int] = Counter()

    def sample(self, logits: torch.Tensor) -> int:
        """The next token, which is then counted as generated.

        Args:
            logits: (V,) on any device. -inf marks a token that must not be chosen.

        Raises:
            KbitError: a logit is NaN or +inf, or all are -inf.
        """
        scores = self._penalise(logits.detach().to("cpu", torch.float32))
        # max() propagates NaN: one pass answers "which is best?" and "is everything a number?".
        best, index = scores.max(dim=0)
        if not math.isfinite(best.item()):
            raise KbitError(
                f"the model produced logits that are not finite (maximum {best.item()}) after "
                f"{self._generated.total()} tokens: the weights are damaged, or a value overflowed; "
                "`kbit info MODEL` checks the file"
            )
        token = int(index.item()) if self.params.temperature == 0 else self._draw(scores - best)
        self._generated[token] += 1
        self._seen.add(token)
        return token

    def _penalise(self, scores: torch.Tensor) -> torch.Tensor:
        p = self.params
        if p.repetition_penalty != 1 and self._seen:
            # Ids beyond the logits cannot be generated, so they need no penalty.
            ids = torch.tensor([i for i in self._seen if i < scores.numel()], dtype=torch.int64)
            scores = repetition_penalty(scores, ids, p.repetition_penalty)
        if (p.presence_penalty or p.frequency_penalty) and self._generated:
            ids = torch.tensor(list(self._generated.keys()), dtype=torch.int64)
            counts = torch.tensor(list(self._generated.values()), dtype=torch.float32)
            scores = scores.index_add(0, ids, -(p.frequency_penalty * counts + p.presence_penalty))
        return scores

    def _draw(self, scores: torch.Tensor) -> int:
        p = self.params
        scores = scores / p.temperature
        if p.top_k:
            scores = keep_top_k(scores, p.top_k)
        if p.top_p < 1:
            scores = keep_top_p(scores, p.top_p)
        if p.min_p:
            scores = keep_min_p(scores, p.min_p)
        # Inverse transform sampling in float64. The first index whose cumulative probability exceeds u is never a
        # token of probability zero, and u < 1 keeps the index inside.
        cumulative = scores.double().softmax(dim=0).cumsum(dim=0)
        u = torch.rand(1, generator=self._generator, dtype=torch.float64) * cumulative[-1]
        return int(torch.searchsorted(cumulative, u, right=True).item())


def repetition_penalty(scores: torch.Tensor, ids: torch.Tensor, penalty: float) -> torch.Tensor:
    """Scores (V,) with those at `ids` (n,) divided by `penalty` where positive, multiplied where negative."""
    seen = scores[ids]
    return scores.index_copy(0, ids, torch.where(seen < 0, seen * penalty, seen / penalty))


def keep_top_k(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Scores (V,) with all but the k largest set to -inf; ties with the k-th are kept."""
    if k >= scores.numel():
        return scores
    smallest_kept = torch.topk(scores, k).values[-1]
    return scores.masked_fill(scores < smallest_kept, -math.inf)


def keep_top_p(scores: torch.Tensor, p: float) -> torch.Tensor:
    """Scores (V,) with all but the nucleus set to -inf: the fewest most probable tokens that together reach p.

    At least one token stays. Ties are cut in sorting order.
    """
    probabilities = scores.double().softmax(dim=0)
    # Sorting is the dear part. Tokens below (1 - p) / V sum to less than 1 - p, so they all go, unsorted.
    # (The minimum keeps the most probable one where rounding puts a uniform distribution below its own mean.)
    low = probabilities < min((1 - p) / scores.numel(), probabilities.max().item())
    candidates = (~low).nonzero()[:, 0]
    ascending, order = probabilities[candidates].sort()
    # Of the ascending order, the longest head whose probability is at most 1 - p goes, the most probable token never.
    gone = ascending.cumsum(dim=0) + probabilities[low].sum() <= 1 - p
    gone[-1] = False
    return scores.masked_fill(low, -math.inf).index_fill(0, candidates[order[gone]], -math.inf)


def keep_min_p(scores: torch.Tensor, p: float) -> torch.Tensor:
    """Scores (V,) with those less than p times as probable as the most probable set to -inf."""
    # Probability ratios are differences of logits, so no softmax is needed.
    return scores.masked_fill(scores < scores.max() + math.log(p), -math.inf)
