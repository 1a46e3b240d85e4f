"""Fitting a form of the law to measured points, for the text as it is and for every redraw of it at once.

Two steps. Within models: least squares of ln KL on the features of the formats, every model's mean taken out, so that a
coefficient is what formats of the same model differ by; what lies far from the fit counts little. Between models: the
models' constants on ln N and ln D, for models that were not measured. All forms are linear in their coefficients, so a
thousand draws cost one matrix product.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kbit.scaling.laws.bootstrap import Array, times_of
from kbit.scaling.laws.forms import Encode, Encoded, Form, Target
from kbit.scaling.laws.suites import Model

# Points that a fit needs beyond its coefficients and constants, to have something to be judged by.
SPARE_POINTS = 3
# Points are weighted by 1 / (1 + (r / (this times the spread))^2), r their residual: Cauchy's weights, with the
# constant at which normal residuals lose 5 % (Holland and Welsch, 1977). Two formats that a model does not bear
# (Lloyd-Max at 3 bits on SmolLM2) would else move the prediction of every other 3-bit format by a tenth of the loss.
_CAUCHY = 2.385
_ROUNDS = 15
# ln N and ln D are told apart only where the models do not lie on a line in them.
MAX_CORRELATION = 0.97


@dataclass(frozen=True, eq=False)
class Between:
    """A regression over models, in logarithms: y = b_1 + b_N ln N + b_D ln D.

    Attributes:
        names: the terms used: "1", and "N", "D" where the models can show them.
        coefficients: (terms, R).
        spread: how far a model lies from the regression: standard deviation of y, for the text as it is. Infinite where
            there are no more models than terms.
        degrees: models beyond the number of terms.
        inverse: (X'X)^-1, for the uncertainty of the regression itself.
        redrawn: whether the draws differ in the models too: then the uncertainty of the regression is in them.
    """

    names: tuple[str, ...]
    coefficients: Array
    spread: float
    degrees: int
    inverse: Array
    redrawn: bool

    def at(self, linear_parameters: int | None, training_tokens: int | None) -> tuple[Array, float]:
        """(y (R,), standard error of a new model's y beyond what the draws show) at a size.

        Raises:
            ValueError: N or D is needed and not given.
        """
        if "N" in self.names and not linear_parameters:
            raise ValueError("the law needs the number of parameters")
        if "D" in self.names and not training_tokens:
            raise ValueError("the law needs the number of training tokens")
        row = _row(self.names, linear_parameters, training_tokens)
        leverage = 0.0 if self.redrawn else float(row @ self.inverse @ row)
        return row @ self.coefficients, self.spread * math.sqrt(1 + leverage)


def between_models(models: Sequence[Model], y: Array, least_spare: int, times: Array | None = None) -> Between:
    """Regress one value per model on what the models can show.

    Args:
        models: M of them.
        y: (M, R).
        least_spare: how many models more than terms a term needs to be taken up.
        times: (M, R) how often each model counts in each draw; None: once.
    """
    names = _terms(models, least_spare)
    X = np.array([_row(names, model.linear_parameters, model.training_tokens) for model in models])
    inverse = np.linalg.pinv(X.T @ X)
    coefficients = inverse @ X.T @ y
    if times is not None:
        coefficients = _weighted(X, y, times)
    degrees = len(models) - len(names)
    residuals = y[:, 0] - X @ coefficients[:, 0]
    spread = math.sqrt(float(residuals @ residuals) / degrees) if degrees > 0 else math.inf
    return Between(names, coefficients, spread, degrees, inverse, times is not None)


def _terms(models: Sequence[Model], least_spare: int) -> tuple[str, ...]:
    count = len(models)
    n = np.log([model.linear_parameters for model in models])
    if count < 2 + least_spare or np.ptp(n) < 0.1:
        return ("1",)
    if count < 3 + least_spare or not all(model.training_tokens for model in models):
        return ("1", "N")
    d = np.log([float(model.training_tokens or 1) for model in models])
    if np.ptp(d) < 0.1 or abs(np.corrcoef(n, d)[0, 1]) > MAX_CORRELATION:
        return ("1", "N")
    return ("1", "N", "D")


def _row(names: tuple[str, ...], linear_parameters: int | None, training_tokens: int | None) -> Array:
    values = {"1": 1.0, "N": math.log(linear_parameters or 1), "D": math.log(training_tokens or 1)}
    return np.array([values[name] for name in names])


def _weighted(X: Array, y: Array, times: Array) -> Array:
    """Least squares with weights that differ from draw to draw: X (P, p), y and times (P, R) -> (p, R)."""
    gram = np.einsum("pi,pr,pj->rij", X, times, X, optimize=True)
    moment = np.einsum("pi,pr->ri", X, times * y, optimize=True)
    solved: Array = np.einsum("rij,rj->ir", np.linalg.pinv(gram, hermitian=True), moment)
    return solved


@dataclass(frozen=True, eq=False)
class Trained:
    """A form fitted to the points of one method.

    Attributes:
        form: which.
        names: of the coefficients.
        slopes: (p, R).
        constants: (R,) of each model in the fit, by id; those that models have in common for a form without own
            constants.
        between: the constants over the models.
        factors: (R,) mean residual of each format over the models it was measured in, by format; empty where the form
            has none.
        encode: of the form.
    """

    form: Form
    names: tuple[str, ...]
    slopes: Array
    constants: Mapping[str, Array]
    between: Between
    factors: Mapping[str, Array]
    encode: Encode

    def knows(self, target: Target) -> bool:
        """Whether the form has an answer for the format."""
        return self._encoded(target) is not None

    def format_part(self, target: Target) -> Array:
        """(R,) the format's part of ln KL.

        Raises:
            ValueError: the form has no answer (see knows).
        """
        encoded = self._encoded(target)
        if encoded is None:
            raise ValueError(f"no answer for {target.format}")
        part: Array = encoded[0] + np.array(encoded[1]) @ self.slopes if encoded[1] else np.full(self.count, encoded[0])
        return part + self.factors[target.format] if self.form.residuals else part

    @property
    def count(self) -> int:
        """R: draws, the text as it is included."""
        return int(self.between.coefficients.shape[1])

    def _encoded(self, target: Target) -> Encoded | None:
        if self.form.residuals and target.format not in self.factors:
            return None
        return self.encode(target)


def train(
    form: Form,
    models: Sequence[Model],
    owners: Sequence[str],
    targets: Sequence[Target],
    log_kl: Array,
    times: Array | None = None,
) -> Trained | None:
    """Fit a form to points of one method.

    Args:
        form: which.
        models: of the suite; those without points here are left aside.
        owners: id of the model of each point, P of them.
        targets: the points' formats.
        log_kl: (P, R).
        times: (M, R) how often each of `models` counts in each draw; None: once.

    Returns:
        None where the points are too few, or of one width for a form that needs several.
    """
    near = [index for index, target in enumerate(targets) if target.region == "near"]
    if form.name in ("bits", "kumar") and len({targets[index].bits for index in near}) < 2:
        return None
    names, encode = form.encoder([targets[index] for index in near])
    rows = [(index, encoded) for index in near if (encoded := encode(targets[index])) is not None]
    present = [model for model in models if any(owners[index] == model.id for index, _ in rows)]
    if len(rows) < len(present) + len(names) + SPARE_POINTS:
        return None
    position = {model.id: at for at, model in enumerate(present)}
    group = np.array([position[owners[index]] for index, _ in rows])
    member = (group == np.arange(len(present))[:, None]).astype(np.float64)  # (M, P)
    X = np.array([encoded[1] for _, encoded in rows]).reshape(len(rows), len(names))
    z = log_kl[[index for index, _ in rows]] - np.array([[encoded[0]] for _, encoded in rows])
    own_times = times_of(times, [index for index, model in enumerate(models) if model.id in position])
    weights = _weights(X, z[:, :1], group, member)
    slopes, constants = _within(X, z, group, member, weights, own_times)
    # A size's term is taken up when two models are left to judge it by; Kumar's form stands on them: one is enough.
    least_spare = len(present) if form.universal else 2 if form.own_constant else 1
    between = between_models(present, constants, least_spare, own_times)
    if not form.own_constant:
        for model in present:
            constants[position[model.id]] = between.at(model.linear_parameters, model.training_tokens)[0]
    by_id = {model.id: constants[position[model.id]] for model in present}
    if not form.residuals:
        return Trained(form, names, slopes, by_id, between, {}, encode)
    left: dict[str, list[Array]] = {}
    for index, target in enumerate(targets):
        encoded = encode(target)
        if encoded is not None and owners[index] in by_id:
            part = encoded[0] + (np.array(encoded[1]) @ slopes if names else 0.0)
            left.setdefault(target.format, []).append(log_kl[index] - by_id[owners[index]] - part)
    factors = {format: np.mean(values, axis=0) for format, values in left.items()}
    return Trained(form, names, slopes, by_id, between, factors, encode)


def _within(
    X: Array, z: Array, group: NDArray[np.intp], member: Array, weights: Array, times: Array | None
) -> tuple[Array, Array]:
    """Weighted least squares with a constant for each model: slopes (p, R) and constants (M, R).

    Args:
        X: (P, p).
        z: (P, R).
        group: (P,) which model.
        member: (M, P) the same, as ones.
        weights: (P,).
        times: (M, R) how often each model counts in each draw; None: once.
    """
    means = member * weights
    means /= means.sum(axis=1, keepdims=True)  # (M, P): weighted means over a model
    slopes = np.zeros((0, z.shape[1]))
    if X.shape[1]:
        centred_X, centred_z = X - (means @ X)[group], z - (means @ z)[group]
        if times is None:
            root = np.sqrt(weights)[:, None]
            slopes = np.linalg.pinv(root * centred_X) @ (root * centred_z)
        else:
            slopes = _weighted(centred_X, centred_z, weights[:, None] * times[group])
    return slopes, means @ (z - X @ slopes)


def _weights(X: Array, z: Array, group: NDArray[np.intp], member: Array) -> Array:
    """Weights (P,) that points far from the fit lose, found for the text as it is, z (P, 1)."""
    weights = np.ones(len(z))
    for _ in range(_ROUNDS):
        slopes, constants = _within(X, z, group, member, weights, None)
        residuals = (z - X @ slopes - constants[group])[:, 0]
        spread = 1.4826 * float(np.median(np.abs(residuals)))  # of normal residuals
        if spread < 1e-9:
            break
        weights = 1 / (1 + np.square(residuals / (_CAUCHY * spread)))
    return weights


def loss_per_kl(delta: Array, kl: Array) -> tuple[Array, float]:
    """How differences of loss relate to divergences: delta = r KL + tau sqrt(KL) times a number of variance 1.

    r is 1 for a model that predicts this text as well as it claims. The scatter grows as the square root because a
    change of the weights also moves the loss to first order, up or down, by an amount proportional to its size, while
    KL is proportional to the size's square. The noise of the text is in tau.

    Args:
        delta, kl: (P, R), of points with small errors.

    Returns:
        r (R,), and tau of the text as it is.
    """
    r: Array = delta.sum(axis=0) / kl.sum(axis=0)
    residuals = delta[:, 0] - r[0] * kl[:, 0]
    return r, math.sqrt(float(np.mean(np.square(residuals) / kl[:, 0])))
