"""How good a model in a format is, from measured points and laws, and which of several are really better.

Losses per token compare within one suite of points (laws.suites); between tokenizers the loss per byte of the
same text does. Models measured on different texts do not compare, and nothing here pretends that they do: one text is
chosen, and what was measured on another is said to be so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kbit.host.errors import KbitError

if TYPE_CHECKING:
    from kbit.scaling.laws.fit import Laws

# Differences below this fraction of the loss count as ties whatever the text says: among dozens of formats that cost
# next to nothing, one is always ahead by chance.
NEGLIGIBLE = 0.001
# Draws of another suite are taken in another order: its clusters are cut otherwise, so nothing is paired.
_TURN = 337


@dataclass(frozen=True, eq=False)
class Quality:
    """A loss, measured or predicted.

    Attributes:
        nll, low, high: nats per token with the interval at the laws' level, on the suite's text.
        delta, delta_low, delta_high: above the model as it is.
        per_byte: nats per byte of text.
        basis: "measured", or the form of law that predicts it.
        extrapolated: in what way it lies beyond what was measured.
        suite: name of the points it comes from: text from outside.
        text: digest of the text.
        draws: float64 (1 + R,) of `per_byte`; suites of one text that differ in their tokenizer are not paired.
    """

    nll: float
    low: float
    high: float
    delta: float
    delta_low: float
    delta_high: float
    per_byte: float
    basis: str
    extrapolated: tuple[str, ...]
    suite: str
    text: str
    draws: NDArray[np.float64]

    def to_dict(self) -> dict[str, object]:
        """For JSON, without the draws."""
        return {
            "nll": self.nll,
            "nll_interval": [self.low, self.high],
            "delta": self.delta,
            "delta_interval": [self.delta_low, self.delta_high],
            "nll_per_byte": self.per_byte,
            "basis": self.basis,
            "extrapolated": list(self.extrapolated),
            "points": self.suite,
        }


@dataclass(frozen=True)
class Standing:
    """Where one of several candidates stands.

    Attributes:
        probability: that it is the best of them, on other text of the kind; None where it does not compare, or where
            something that its loss leaves out would have to be compared too.
        tied: no worse than the best as far as the text can tell: the interval of their difference reaches below
            NEGLIGIBLE of the loss.
        compares: whether its loss compares with those of the others.
    """

    probability: float | None
    tied: bool
    compares: bool = False


def judge(
    laws: Laws,
    format: str,
    method: str,
    *,
    measured: str | None,
    tokenizer: str | None,
    linear_parameters: int,
    training_tokens: int | None,
) -> Quality | str:
    """The loss of a model in a format, or why it cannot be told.

    Args:
        laws: fitted to the points.
        format: a format string, or ORIGINAL.
        method: how codes are found.
        measured: the model's name among the points, or None.
        tokenizer: digest of its tokenizer; a model that was not measured compares only with those that share it.
        linear_parameters, training_tokens: N and D.
    """
    from kbit.scaling.laws.predict import Query, predict

    if measured is None and tokenizer is None:
        return "no point of this model, and no tokenizer to tell which points bear on it"
    if measured is not None:
        query = Query(format, method, model=measured)
    else:
        n, tokens = linear_parameters, training_tokens
        query = Query(format, method, tokenizer=tokenizer, linear_parameters=n, training_tokens=tokens)
    try:
        found = predict(laws, query)
    except KbitError as error:
        return str(error)
    rate = found.laws.suite.tokens_per_byte
    draws = found.nll_draws * rate
    if not np.isfinite(draws).all():
        return "its loss is too large to tell"
    return Quality(
        nll=found.nll,
        low=found.nll_low,
        high=found.nll_high,
        delta=found.delta,
        delta_low=found.delta_low,
        delta_high=found.delta_high,
        per_byte=found.nll_per_byte,
        basis=found.basis,
        extrapolated=tuple(found.extrapolated),
        suite=found.laws.suite.name,
        text=found.laws.suite.points[0].data_sha256,
        draws=draws,
    )


def compare(qualities: Sequence[Quality | None], level: float = 0.95) -> list[Standing]:
    """Where each candidate stands among those that compare with most of the others.

    Args:
        qualities: of candidates; None for one without.
        level: of the intervals of differences.
    """
    texts = Counter(quality.text for quality in qualities if quality is not None)
    if not texts:
        return [Standing(None, False)] * len(qualities)
    text = texts.most_common(1)[0][0]
    group = [index for index, quality in enumerate(qualities) if quality is not None and quality.text == text]
    suites: dict[str, int] = {}
    rows = []
    for index in group:
        quality = qualities[index]
        assert quality is not None
        turn = suites.setdefault(quality.suite, len(suites)) * _TURN
        rows.append(np.concatenate([quality.draws[:1], np.roll(quality.draws[1:], turn)]))
    draws = min(len(row) for row in rows)
    table = np.stack([row[:draws] for row in rows])  # (candidates, 1 + R); the first column is the estimate
    best = int(table[:, 0].argmin())
    wins = np.bincount(table[:, 1:].argmin(axis=0), minlength=len(rows)) / max(draws - 1, 1)
    lowest = np.percentile(table[:, 1:] - table[best, 1:], 50 * (1 - level), axis=1)
    standings = [Standing(None, False)] * len(qualities)
    for place, index in enumerate(group):
        standings[index] = Standing(
            float(wins[place]), place == best or bool(lowest[place] <= NEGLIGIBLE * table[best, 0]), True
        )
    return standings
