"""Speculative sampling keeps the distribution: chi-square tests of whole short texts against exact probabilities.

A text of L tokens over a vocabulary of V has V^L outcomes, whose probabilities are computed here from first principles.
Counting whole texts tests every position and every dependence between them at once: the token after a rejection, the
one after a draft that held, penalties that follow from what was accepted.

The seeds are fixed, so a pass is a pass for ever. The thresholds are for the one who changes a seed: a correct sampler
fails a test with probability LEVEL, all of them together with less than 1e-6.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kbit.checkpoint.ladder import Ladder
from kbit.engine import self_speculation
from kbit.engine.draft_policy import Plan, WidthRecord
from kbit.engine.draft_widths import Width
from kbit.engine.ngram import NgramDrafter
from kbit.engine.prompt_cache import PromptCache
from kbit.engine.sampler import Guess, Probabilities, Sampler, SamplingParams
from kbit.engine.self_speculation import SelfDrafter
from kbit.engine.speculative import Drafter, DraftModel, Speculation, SpeculativeTokens

pytestmark = pytest.mark.usefixtures("one_thread")

V, LENGTH, TEXTS, LEVEL = 4, 4, 3000, 1e-7
PROMPT = (1, 3)

CASES: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 1.2},
    "cuts": {"temperature": 1.6, "top_k": 3, "top_p": 0.95, "min_p": 0.05},
    "penalties": {
        "temperature": 0.9,
        "repetition_penalty": 1.5,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.4,
    },
}


def table(seed: int) -> torch.Tensor:
    """Logits (V, V): row t is what follows token t."""
    return 1.2 * torch.randn(V, V, generator=torch.Generator().manual_seed(seed))


TARGET, DRAFT = table(0), table(2)


def next_probabilities(params: SamplingParams, answer: tuple[int, ...]) -> list[float]:
    """The distribution of the next token, written down again from the definitions in kbit.engine.sampler, in float64."""
    scores = TARGET[(*PROMPT, *answer)[-1]].tolist()
    for token in range(V):
        if token in PROMPT or token in answer:
            r = params.repetition_penalty
            scores[token] = scores[token] * r if scores[token] < 0 else scores[token] / r
        count = answer.count(token)
        scores[token] -= params.frequency_penalty * count + params.presence_penalty * (count > 0)
    weights = [math.exp(score / params.temperature) for score in scores]
    order = sorted(range(V), key=lambda token: -weights[token])
    if params.top_k:
        order = order[: params.top_k]
    kept, mass = [], 0.0
    for token in order:  # the fewest tokens that reach top_p
        if mass < params.top_p * sum(weights[t] for t in order):
            kept.append(token)
            mass += weights[token]
    kept = [token for token in kept if weights[token] >= params.min_p * weights[order[0]]]
    total = sum(weights[token] for token in kept)
    return [weights[token] / total if token in kept else 0.0 for token in range(V)]


def texts(
    params: SamplingParams, answer: tuple[int, ...] = (), probability: float = 1.0
) -> Iterator[tuple[Any, float]]:
    """Every possible text and its probability."""
    if len(answer) == LENGTH:
        yield answer, probability
        return
    for token, share in enumerate(next_probabilities(params, answer)):
        if share > 0:
            yield from texts(params, (*answer, token), probability * share)


def p_value(counts: Counter[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> float:
    """Of Pearson's chi-square test; outcomes expected fewer than 5 times are taken together. 0 for impossible texts."""
    if set(counts) - set(expected):
        return 0.0
    n = sum(counts.values())
    cells = [(counts[text], n * share) for text, share in expected.items() if n * share >= 5]
    rare = n - sum(wanted for _, wanted in cells)
    if rare >= 5:
        cells.append((n - sum(seen for seen, _ in cells), rare))
    statistic = sum((seen - wanted) ** 2 / wanted for seen, wanted in cells)
    # Survival function of chi-square: the regularised upper incomplete gamma function.
    half_freedom, half_statistic = (torch.tensor(x / 2, dtype=torch.float64) for x in (len(cells) - 1, statistic))
    return float(torch.special.gammaincc(half_freedom, half_statistic))


class _Length:
    """All that such a decoder needs of a cache."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.rows, self.pool = capacity, [SimpleNamespace(length=0)], SimpleNamespace(states=None)

    def kept_before(self, length: int) -> int:
        return min(length, self.rows[0].length)

    def truncate(self, length: int) -> None:
        self.rows[0].length = length


class Markov:
    """A decoder whose logits depend on the last token alone: nothing needs to be in its cache."""

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits
        self.spec = SimpleNamespace(max_positions=1000, longest_in_pieces=1000, begins_anew_beyond=None, vocab_size=V)

    def new_cache(self, batch: int, capacity: int) -> Any:
        return _Length(capacity)

    def extend(self, ids: Sequence[int], cache: Any, last_only: bool = True) -> Any:
        cache.rows[0].length += len(ids)
        return self.logits[list(ids[-1:] if last_only else ids)].numpy()


def sampled(
    params: dict[str, Any], draft_tokens: int, count: int = TEXTS, drafter: Drafter | None = None
) -> tuple[Counter[tuple[int, ...]], float]:
    """So many texts with a draft model, each with its own seed; and the share of drafted tokens that were accepted."""
    cache = PromptCache(Markov(TARGET))
    speculation = Speculation(drafter or DraftModel("draft", Markov(DRAFT)), draft_tokens)
    counts: Counter[tuple[int, ...]] = Counter()
    drafted = accepted = 0
    for seed in range(count):
        cache.start(PROMPT, 64)
        cache.truncate(0)
        run = SpeculativeTokens(
            speculation,
            cache,
            Sampler(SamplingParams(**params, seed=seed), PROMPT, choice=0),
            PROMPT,
            room=LENGTH,
            end_ids=(),
            vocab_size=V,
            one_by_one_from=1000,
        )
        tokens = run.run(cache.extend(PROMPT))
        counts[tuple(next(tokens) for _ in range(LENGTH))] += 1
        drafted += run.report.drafted
        accepted += run.report.accepted
    return counts, accepted / drafted


@pytest.mark.parametrize(
    ("case", "draft_tokens"), [("temperature", 1), ("temperature", 3), ("cuts", 3), ("penalties", 3)]
)
def test_texts_have_the_distribution_of_the_model(case: str, draft_tokens: int) -> None:
    expected = dict(texts(SamplingParams(**CASES[case])))
    assert sum(expected.values()) == pytest.approx(1)
    counts, rate = sampled(CASES[case], draft_tokens)
    assert 0.2 < rate < 0.9  # both branches of the rule were taken often
    found = p_value(counts, expected)
    assert found > LEVEL, f"p = {found:.2e}"


@pytest.fixture
def self_drafter(monkeypatch: pytest.MonkeyPatch) -> SelfDrafter:
    """Low planes that speak as DRAFT does; a draft ends with the first token of whose like less than 0.5 is sure."""
    monkeypatch.setattr(WidthRecord, "plan", lambda *_: Plan(2.0, 3, 0.5))
    monkeypatch.setattr(NgramDrafter, "find", lambda *_: [])
    width = Width(3, Markov(DRAFT), 0.3, WidthRecord())  # type: ignore[arg-type]
    monkeypatch.setattr(self_speculation, "draft_widths", lambda *_: ([width], None))
    return SelfDrafter(SimpleNamespace(name="tiny", ladder=Ladder((8, 3)), bits=8))  # type: ignore[arg-type]


def test_drafts_that_end_where_they_are_unsure_keep_the_distribution(self_drafter: SelfDrafter) -> None:
    sure = DRAFT.softmax(-1).amax(-1)
    assert (sure < 0.5).any()
    assert (sure >= 0.5).any()
    counts, rate = sampled(CASES["temperature"], 3, drafter=self_drafter)
    assert 0.2 < rate < 0.9
    assert p_value(counts, dict(texts(SamplingParams(**CASES["temperature"])))) > LEVEL


def test_the_test_notices_drafts_that_end_by_what_was_drawn(
    self_drafter: SelfDrafter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guess left out for its own probability: what is left is not drawn from the distribution it is said to be."""
    propose = SelfDrafter.propose

    def picky(self: SelfDrafter, text: list[int], most: int, sampler: Sampler) -> list[Guess]:
        kept = []
        for token, proposal in propose(self, text, most, sampler):
            if proposal is not None and proposal[token] < 0.4:
                break
            kept.append((token, proposal))
        return kept

    monkeypatch.setattr(SelfDrafter, "propose", picky)
    counts, _ = sampled(CASES["temperature"], 3, drafter=self_drafter)
    assert p_value(counts, dict(texts(SamplingParams(**CASES["temperature"])))) < LEVEL


def always_accept(self: Sampler, logits: torch.Tensor, drafted: int, proposal: Probabilities) -> int:
    self._count(drafted)
    return drafted


def resample_from_the_model(self: Sampler, logits: torch.Tensor, drafted: int, proposal: Probabilities) -> int:
    """The rule without its second half: a rejected guess is replaced by a draw from p, not from max(p - q, 0)."""
    target, _ = probabilities(self, logits)
    if self._uniform() * proposal[drafted] < target[drafted]:
        self._count(drafted)
        return drafted
    return self.sample(logits)


def upside_down(self: Sampler, logits: torch.Tensor, drafted: int, proposal: Probabilities) -> int:
    """q / p in place of p / q."""
    target, _ = probabilities(self, logits)
    if self._uniform() * target[drafted] < proposal[drafted]:
        self._count(drafted)
        return drafted
    residual = (target - proposal).clip(min=0)
    token = self._draw(None, residual if residual.any() else target)
    self._count(token)
    return token


def forgetful(self: Sampler, logits: torch.Tensor, drafted: int, proposal: Probabilities) -> int:
    """The right rule, but what it accepts is not counted for the penalties."""
    before, seen = self._generated.copy(), self._seen.copy()
    token = Sampler._verify(self, logits, drafted, proposal)  # type: ignore[attr-defined]
    self._generated, self._seen = before, seen
    return token


def probabilities(sampler: Sampler, logits: torch.Tensor) -> tuple[Probabilities, int]:
    from kbit.engine.sampler import _probabilities

    scores, best = sampler._scores(logits)
    return _probabilities(*sampler._weights(scores, best), scores.size), best


@pytest.mark.parametrize(
    ("mutant", "case"),
    [
        (always_accept, "temperature"),
        (resample_from_the_model, "temperature"),
        (resample_from_the_model, "cuts"),
        (upside_down, "temperature"),
        (forgetful, "penalties"),
    ],
)
def test_the_test_notices_a_wrong_rule(mutant: Callable[..., int], case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sampler, "_verify", Sampler.verify, raising=False)
    monkeypatch.setattr(Sampler, "verify", mutant)
    counts, _ = sampled(CASES[case], 3, TEXTS // 2)
    assert p_value(counts, dict(texts(SamplingParams(**CASES[case])))) < LEVEL


def test_the_test_notices_the_drafts_penalties_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proposal said to be drawn from another distribution than it was: the draft's own, were it not penalised."""
    propose = Sampler.propose

    def unpenalised(self: Sampler, logits: torch.Tensor, pending: list[int]) -> Any:
        token, _ = propose(self, logits, pending)
        plain = Sampler(SamplingParams(temperature=self.params.temperature, seed=0))
        return token, probabilities(plain, logits)[0]

    monkeypatch.setattr(Sampler, "propose", unpenalised)
    counts, _ = sampled(CASES["penalties"], 3)
    assert p_value(counts, dict(texts(SamplingParams(**CASES["penalties"])))) < LEVEL


def test_guesses_are_accepted_as_often_as_they_can_be() -> None:
    """No rule accepts more often than with probability sum min(p, q), 1 minus the distance of the distributions."""
    n, row = 4000, PROMPT[-1]
    p, q = ((logits[row] / 1.2).double().softmax(0) for logits in (TARGET, DRAFT))
    sampler = Sampler(SamplingParams(1.2, seed=0))
    hits = 0
    for _ in range(n):
        guess, proposal = sampler.propose(DRAFT[row], [])
        hits += sampler.verify(TARGET[row], guess, proposal) == guess
    expected = float(torch.minimum(p, q).sum())
    # Five and a half standard deviations of a binomial share: missed with probability 4e-8.
    assert abs(hits / n - expected) < 5.5 * math.sqrt(expected * (1 - expected) / n)
