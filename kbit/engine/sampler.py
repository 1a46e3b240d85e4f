"""From logits to the next token.

Order of operations, that of transformers (`GenerationMixin._get_logits_processor`), so that the same settings mean the
same distribution there and here:

0. logit bias, by the definition of the OpenAI API;
1. repetition penalty (prompt and generated tokens), then frequency and presence penalty (generated tokens only);
2. temperature;
3. top-k, top-p, min-p, typical, each on what the one before it left (top-k on the logits before the temperature, which
   changes no order).

Penalties come first because they change what the model says about a token, and everything after cuts a distribution.
Temperature comes before the cuts: top-p and min-p then speak about the distribution that is drawn from. Temperature 0
takes the largest penalised logit. transformers has no presence and frequency penalty; these follow the definition of
the OpenAI API, which vLLM shares.

This is what choosing means, in numpy, and what speculation uses (`Sampler.propose`, `Sampler.verify`). Whoever only
chooses uses `kbit.engine.native_sampler`, which gives the same tokens sooner.
"""

from __future__ import annotations

import math
import secrets
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from kbit.engine.cuts import (
    Indices,
    Scores,
    draw,
    exponential,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    keep_typical,
    scaled,
)
from kbit.engine.randomness import KeyedUniform
from kbit.host.errors import KbitError, UsageError

if TYPE_CHECKING:
    import torch

# Below this a temperature is indistinguishable from greedy decoding, and logits divided by it can leave float32.
MIN_TEMPERATURE = 1e-6
# What random numbers beside those that draw tokens are for: each use of a place has its own (`KeyedUniform.at`), as
# guesses, their acceptance and what is drawn instead must not depend on one another.
_PROPOSING, _ACCEPTING = 1, 2

# (V,): a tensor on any device, or an array, which saves the calls into torch that cost the most per token.
Logits: TypeAlias = "torch.Tensor | Scores"
Probabilities = npt.NDArray[np.float64]
# A token that may come next, and the distribution (V,) it was drawn from; None where it was not drawn at random.
Guess = tuple[int, Probabilities | None]


@dataclass(frozen=True)
class SamplingParams:
    """How to choose the next token. The defaults are greedy decoding.

    Attributes:
        temperature: logits are divided by it; 0 is greedy.
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: keep the smallest set of most probable tokens whose probabilities reach this sum (Holtzman et al. 2020).
        min_p: keep tokens at least this fraction as probable as the most probable one (Nguyen et al. 2024).
        typical_p: keep the most typical tokens whose probabilities reach this sum (Meister et al. 2022).
        repetition_penalty: divides positive and multiplies negative logits of tokens seen in prompt or answer
            (Keskar et al. 2019, CTRL); 1 is none.
        presence_penalty: subtracted from the logits of tokens generated at least once; 0 is none.
        frequency_penalty: subtracted once for every time a token was generated; 0 is none.
        seed: of the random generator; None draws a fresh one.
        logit_bias: (token, what is added to its logit before all else); a token once at most.

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
    logit_bias: tuple[tuple[int, float], ...] = ()
    typical_p: float = 1.0

    def __post_init__(self) -> None:
        t = self.temperature
        _require(t == 0 or MIN_TEMPERATURE <= t < math.inf, "--temperature", t, "0 (greedy) or a number from 1e-6 up")
        _require(self.top_k >= 0, "--top-k", self.top_k, "a whole number of tokens to keep, or 0 for all")
        _require(0 < self.top_p <= 1, "--top-p", self.top_p, "a probability above 0 and at most 1 (1 keeps all)")
        _require(0 <= self.min_p <= 1, "--min-p", self.min_p, "a fraction from 0 (keeps all) to 1")
        _require(0 < self.typical_p <= 1, "--typical-p", self.typical_p, "a probability above 0, at most 1 (1 is all)")
        r = self.repetition_penalty
        _require(0 < r < math.inf, "--repetition-penalty", r, "a number above 0 (1 is none, 1.1 is usual)")
        for flag, value in (
            ("--presence-penalty", self.presence_penalty),
            ("--frequency-penalty", self.frequency_penalty),
        ):
            _require(math.isfinite(value), flag, value, "a finite number (0 is none, up to 2 is usual)")
        if self.seed is not None:
            _require(0 <= self.seed < 2**63, "--seed", self.seed, "a whole number from 0 to 2**63 - 1")

    @property
    def inverse_temperature(self) -> float:
        """What logits are multiplied with, a float32; 0 is greedy. However high a temperature is, -inf stays -inf."""
        return float(np.float32(max(1 / self.temperature, 1e-30))) if self.temperature else 0.0


def _require(good: bool, flag: str, value: float, expected: str) -> None:
    if not good:
        raise UsageError(f"{flag} {value}: expected {expected}")


class Sampler:
    """Draws the tokens of one request and remembers them for the penalties.

    Sampling runs on the CPU with a generator of its own: neither the global random state nor the device the logits
    come from changes what a seed gives. `sample` spends one uniform number per token, whatever the vocabulary.

    Args:
        params: how to choose.
        prompt_ids: the prompt, which the repetition penalty counts as seen.
        choice: which of several answers to one request this is. The random number of a token depends on the seed, the
            choice and the token's place in the answer alone (`KeyedUniform`), however the tokens before it came about.

    Attributes:
        seed: the seed in use, also when params.seed was None.
    """

    def __init__(self, params: SamplingParams, prompt_ids: Iterable[int] = (), choice: int = 0) -> None:
        self.params = params
        self.seed = secrets.randbits(63) if params.seed is None else params.seed
        self._greedy = params.temperature == 0
        self._penalises = bool(
            params.logit_bias or params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty
        )
        self._keyed = KeyedUniform(self.seed, choice)
        self._position = 0  # tokens that were counted
        self._seen = set(prompt_ids)
        self._generated: Counter[int] = Counter()

    def sample(self, logits: Logits) -> int:
        """The next token, which is then counted as generated.

        Args:
            logits: (V,) on any device. -inf marks a token that must not be chosen.

        Raises:
            KbitError: a logit is NaN or +inf, or all are -inf.
        """
        scores, best = self._scores(logits)
        token = best if self._greedy else self._draw(*self._weights(scores, best))
        self._count(token)
        return token

    def distribution(self, logits: Logits) -> Probabilities:
        """float64 (V,): the probabilities that `sample` draws the next token by. Nothing is counted.

        Args:
            logits: (V,) on any device.

        Raises:
            KbitError: as `sample`.
        """
        scores, best = self._scores(logits)
        if self._greedy:
            return _probabilities(np.array([best]), np.ones(1, np.float32), scores.size)
        return _probabilities(*self._weights(scores, best), scores.size)

    def count(self, token: int) -> None:
        """Counts a token as generated that something else chose."""
        self._count(token)

    def propose(self, logits: Logits, pending: Sequence[int]) -> Guess:
        """A guess at a token, chosen as tokens are but not counted, from the logits of another model.

        Args:
            logits: (V,) on any device.
            pending: tokens drafted before this one, which the penalties count as generated.

        Raises:
            KbitError: as `sample`.
        """
        scores, best = self._scores(logits, pending)
        if self._greedy:
            return best, None
        probabilities = _probabilities(*self._weights(scores, best), scores.size)
        return self._draw(None, probabilities, _PROPOSING, len(pending)), probabilities

    def verify(self, logits: Logits, drafted: int, proposal: Probabilities | None) -> int:
        """The next token, given a guess at it: distributed as if `sample` had drawn it, equal to the guess if possible.

        Speculative sampling (Leviathan et al. 2023, arXiv:2211.17192, algorithm 1; Chen et al. 2023, arXiv:2302.01318):
        with p what these logits say and q the proposal's distribution, the guess x is taken with probability
        min(1, p(x) / q(x)); otherwise the token is drawn from max(p - q, 0), normalised. A guess that was no draw is a
        point mass q; drawing from p and seeing whether x comes out has the same outcome, and spends the random numbers
        of plain sampling, so that then even the tokens are the same.

        Args:
            logits: (V,) on any device.
            drafted: the guess.
            proposal: (at most V,), the distribution it was drawn from; None if it was not drawn at random.

        Raises:
            KbitError: as `sample`.
        """
        if proposal is None or self._greedy:
            return self.sample(logits)
        scores, best = self._scores(logits)
        target = _probabilities(*self._weights(scores, best), scores.size)
        # Strictly below: a token of probability 0 is never taken, also when the uniform number is 0.
        if self._uniform(_ACCEPTING) * proposal[drafted] < target[drafted]:
            token = drafted
        else:
            residual = target.copy()
            residual[: proposal.size] -= proposal
            np.maximum(residual, 0, out=residual)
            # A rejection means p(x) < q(x), hence p > q somewhere. Nothing can be left only where the two differ by no
            # more than rounding, and then p itself is as good.
            token = self._draw(None, residual if residual.any() else target)
        self._count(token)
        return token

    def _count(self, token: int) -> None:
        self._generated[token] += 1
        self._position += 1
        self._seen.add(token)

    def _scores(self, logits: Logits, pending: Sequence[int] = ()) -> tuple[Scores, int]:
        """Penalised logits (V,), which may share memory with `logits`, and the index of the largest."""
        scores: Scores
        scores = logits if isinstance(logits, np.ndarray) else logits.detach().cpu().float().numpy()
        if self._penalises:
            scores = self._penalise(scores, pending)
        # A NaN counts as the largest: one pass answers "which is best?" and "is everything a number?".
        best = int(scores.argmax())
        if not math.isfinite(scores[best]):
            raise not_finite(float(scores[best]), self._position)
        return scores, best

    def _penalise(self, scores: Scores, pending: Sequence[int] = ()) -> Scores:
        p = self.params
        seen, generated = self._seen, self._generated
        if pending:
            seen, generated = seen.union(pending), generated + Counter(pending)
        scores = scores.copy()
        with np.errstate(over="ignore"):  # a penalty beyond float32 is infinite
            if p.logit_bias:
                scores[[token for token, _ in p.logit_bias]] += np.array([b for _, b in p.logit_bias], np.float32)
            if p.repetition_penalty != 1 and seen:
                ids = np.fromiter(seen, np.int64, len(seen))
                # Ids beyond the logits cannot be generated, so they need no penalty.
                repetition_penalty(scores, ids[ids < scores.size], p.repetition_penalty)
            if (p.presence_penalty or p.frequency_penalty) and generated:
                ids = np.fromiter(generated.keys(), np.int64, len(generated))
                counts = np.fromiter(generated.values(), np.float32, len(generated))
                scores[ids] -= np.float32(p.frequency_penalty) * counts + np.float32(p.presence_penalty)
        return scores

    def _weights(self, scores: Scores, best: int) -> tuple[Indices | None, Scores]:
        """What temperature and cuts leave of penalised logits (V,).

        Returns:
            Candidates (n,) in ascending order, None for all of them, and their unnormalised probabilities (n,), of
            which the largest is 1.
        """
        p = self.params
        candidates: Indices | None = None
        if p.top_k:
            candidates = keep_top_k(scores, p.top_k)
        scores = scaled(scores if candidates is None else scores[candidates], scores[best], p.inverse_temperature)
        for keep, setting, off in ((keep_top_p, p.top_p, 1), (keep_min_p, p.min_p, 0), (keep_typical, p.typical_p, 1)):
            if setting != off:
                kept = keep(scores, setting)
                scores, candidates = scores[kept], kept if candidates is None else candidates[kept]
        return candidates, exponential(scores)

    def _draw(self, candidates: Indices | None, weights: npt.NDArray[np.floating], use: int = 0, ahead: int = 0) -> int:
        """One of the candidates (n,), None for 0 to n - 1, with probabilities proportional to their weights (n,)."""
        index = draw(weights, self._uniform(use, ahead))
        return index if candidates is None else int(candidates[index])

    def _uniform(self, use: int = 0, ahead: int = 0) -> float:
        """A number in [0, 1) with 53 random bits, for a use of the token that comes after so many drafted ones."""
        return self._keyed.at(self._position + ahead, use)


def not_finite(value: float, tokens: int) -> KbitError:
    """The error of logits whose largest is `value`, after so many tokens."""
    return KbitError(
        f"the model produced logits that are not finite (maximum {value}) after {tokens} tokens: the weights are "
        "damaged, or a value overflowed; `kbit info MODEL` checks the file"
    )


def _probabilities(candidates: Indices | None, weights: Scores, size: int) -> Probabilities:
    """Candidates (n,) and their weights (n,) as a distribution (size,)."""
    shares = weights.astype(np.float64)
    shares /= shares.sum()
    if candidates is None:
        return shares
    probabilities = np.zeros(size)
    probabilities[candidates] = shares
    return probabilities


def repetition_penalty(scores: Scores, ids: Indices, penalty: float) -> None:
    """Divides the scores (V,) at `ids` (n,) by `penalty` where positive, multiplies where negative; in place."""
    seen = scores[ids]
    scores[ids] = np.where(seen < 0, seen * np.float32(penalty), seen / np.float32(penalty))
