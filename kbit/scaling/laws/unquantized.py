"""Laws for models as they are: loss over parameters and training tokens.

- "power": L = a N^b D^c C^d. With C = 6 N D, the usual count of the operations of training, ln C is a sum of ln N and
  ln D: the exponents b + d and c + d are all that any data can show, and they are what is reported (as b and c, with d
  = 0).
- "published": L = E + s (406.4 / N^0.34 + 410.7 / D^0.28): Hoffmann et al.'s law with their coefficients (2022,
  equation 10), of which the family sets two: E, what no model of this text and tokenizer gets below, and s, how much a
  token of the tokenizer holds. Two coefficients and not the power law's three, and curved as losses are: from five
  models of the novels family it predicts each from the other four within 1.9 %, the power law within 5.4 %.
- "chinchilla": L = E + A / N^alpha + B / D^beta (Hoffmann et al., 2022, section 3.3), the part of Kumar et al.'s law
  (2024) that does not depend on the width. Five coefficients: it is fitted from seven models on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kbit.scaling.laws.bootstrap import Array
from kbit.scaling.laws.fitting import MAX_CORRELATION, Between, between_models
from kbit.scaling.laws.suites import Model

# Five coefficients, and two models more to judge them by.
MIN_MODELS_CHINCHILLA = 7
# Hoffmann et al.: A, alpha, B, beta.
PUBLISHED = (406.4, 0.34, 410.7, 0.28)
# Exponents tried for N and D. Published values lie between 0.28 and 0.5; small models show smaller ones.
_EXPONENTS = np.linspace(0.05, 1.0, 20)
# Which of E, A and B are not zero.
_TERMS = ([0, 1, 2], [0, 1], [0, 2], [1, 2], [0], [1], [2])


@dataclass(frozen=True, eq=False)
class Chinchilla:
    """L = E + A / N^alpha + B / D^beta, for each draw.

    Attributes:
        E, A, alpha, B, beta: (R,) each.
    """

    E: Array
    A: Array
    alpha: Array
    B: Array
    beta: Array

    def at(self, linear_parameters: int, training_tokens: int) -> Array:
        """Loss (R,) of a model in nats per token."""
        loss: Array = self.E + self.A * linear_parameters**-self.alpha + self.B * training_tokens**-self.beta
        return loss


@dataclass(frozen=True, eq=False)
class Published:
    """L = E + s h(N, D) for each draw, h the sizes' part of Hoffmann et al.'s law. Has what `fitting.Between` has.

    Attributes:
        E, s: (R,) each.
        spread: how far a model lies from the law, relative to its loss: standard deviation, for the text as it is.
            Infinite where there are no more models than coefficients.
        degrees: models beyond two.
        inverse: (X'X)^-1 of the regression.
    """

    E: Array
    s: Array
    spread: float
    degrees: int
    inverse: Array
    names: tuple[str, ...] = ("1", "N", "D")

    def at(self, linear_parameters: int | None, training_tokens: int | None) -> tuple[Array, float]:
        """(ln L (R,), standard error of a new model's ln L beyond what the draws show) at a size.

        Raises:
            ValueError: N or D is not given.
        """
        if not linear_parameters:
            raise ValueError("the law needs the number of parameters")
        if not training_tokens:
            raise ValueError("the law needs the number of training tokens")
        h = _published(float(linear_parameters), float(training_tokens))
        loss: Array = self.E + self.s * h
        row = np.array([1.0, h]) / loss[0]
        return np.log(loss), self.spread * math.sqrt(1 + float(row @ self.inverse @ row))


def fit_own_loss(models: Sequence[Model], nll: Array, times: Array | None = None) -> Between | Published:
    """The law that losses of unmeasured models are predicted with: the published one, as long as models are too few to
    set exponents by and their training tokens are known.

    Args:
        models: M models, at least 2.
        nll: (M, R) their losses as they are.
        times: (M, R) how often each model counts in each draw; None: once.
    """
    published = fit_published(models, nll) if len(models) < MIN_MODELS_CHINCHILLA else None
    return published or fit_power(models, nll, times)


def fit_published(models: Sequence[Model], nll: Array) -> Published | None:
    """Least squares of errors relative to the loss; E and s are not negative.

    Args:
        models: M models.
        nll: (M, R).

    Returns:
        None where a model's D is unknown, or where the models' sizes are too alike to set two coefficients by.
    """
    if len(models) < 2 or not all(model.training_tokens for model in models):
        return None
    h = np.array([_published(float(model.linear_parameters), float(model.training_tokens or 1)) for model in models])
    if np.ptp(h) < 0.05 * h.mean():
        return None
    X = np.stack([np.ones_like(h), h], axis=1) / nll[:, :1]
    relative = nll / nll[:, :1]
    solved = np.linalg.pinv(X) @ relative  # (2, R)
    for zero, kept in ((0, 1), (1, 0)):
        alone = X[:, kept] @ relative / (X[:, kept] @ X[:, kept])
        negative = solved[zero] < 0
        solved[kept] = np.where(negative, alone, solved[kept])
        solved[zero] = np.where(negative, 0.0, solved[zero])
    degrees = len(models) - 2
    residuals = relative[:, 0] - X @ solved[:, 0]
    spread = math.sqrt(float(residuals @ residuals) / degrees) if degrees > 0 else math.inf
    return Published(solved[0], solved[1], spread, degrees, np.linalg.pinv(X.T @ X))


def _published(n: float, d: float) -> float:
    a, alpha, b, beta = PUBLISHED
    return float(a * n**-alpha + b * d**-beta)


def fit_power(models: Sequence[Model], nll: Array, times: Array | None = None) -> Between:
    """The power law, in logarithms: terms "1" for ln a, "N" and "D" for the exponents.

    Args:
        models: M models, at least 2.
        nll: (M, R) their losses as they are.
        times: (M, R) how often each model counts in each draw.
    """
    # Two models: the line through them is a better guess than their mean, though nothing is left to judge it by.
    return between_models(models, np.log(nll), 1 if len(models) > 2 else 0, times)


def fit_chinchilla(models: Sequence[Model], nll: Array) -> Chinchilla | None:
    """Least squares over a grid of exponents, of errors relative to the loss; E, A and B are not negative.

    Given the exponents the law is linear, so no starting point is to be chosen and no local minimum to be fallen into.
    The best non-negative coefficients are the best of the ordinary least squares on any of the seven sets of terms that
    come out non-negative, and these are one matrix for all draws.

    Args:
        models: M models.
        nll: (M, R).

    Returns:
        None where the models are too few, or their D is unknown or tied to N.
    """
    if len(models) < MIN_MODELS_CHINCHILLA or not all(model.training_tokens for model in models):
        return None
    n = np.array([float(model.linear_parameters) for model in models])
    d = np.array([float(model.training_tokens or 1) for model in models])
    if abs(np.corrcoef(np.log(n), np.log(d))[0, 1]) > MAX_CORRELATION:
        return None
    # Sizes relative to the geometric means keep the columns of the same order.
    n0, d0 = math.exp(float(np.log(n).mean())), math.exp(float(np.log(d).mean()))
    relative = nll / nll[:, :1]
    best = np.full(nll.shape[1], math.inf)
    found = np.zeros((5, nll.shape[1]))
    for alpha in _EXPONENTS:
        for beta in _EXPONENTS:
            X = np.stack([np.ones_like(n), (n / n0) ** -alpha, (d / d0) ** -beta], axis=1) / nll[:, :1]
            for terms in _TERMS:
                solved = np.linalg.pinv(X[:, terms]) @ relative
                missed = np.square(relative - X[:, terms] @ solved).sum(axis=0)
                better = (solved >= 0).all(axis=0) & (missed < best)
                best[better] = missed[better]
                found[:, better] = 0.0
                for term, value in zip(terms, solved[:, better], strict=True):
                    found[term, better] = value
                found[3, better], found[4, better] = alpha, beta
    E, A, B, alphas, betas = found
    return Chinchilla(E, A * n0**alphas, alphas, B * d0**betas, betas)
