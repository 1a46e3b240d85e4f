"""What was fitted, in numbers and words: parameters with intervals, and how well a form fits its own points."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kbit.evaluate.statistics import SEED
from kbit.scaling.laws.bootstrap import Array, interval
from kbit.scaling.laws.fitting import Between, Trained
from kbit.scaling.laws.forms import Form, Target
from kbit.scaling.laws.suites import Model, Suite
from kbit.scaling.laws.unquantized import PUBLISHED, Published
from kbit.scaling.points import Point


@dataclass(frozen=True)
class Parameter:
    """A fitted number and its interval. An unbounded interval means: too few models to say."""

    name: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Fit:
    """A form fitted to the points of one method.

    Attributes:
        name: of the form (laws.forms), or of the law of models as they are (laws.unquantized).
        method: whose points; "original" for models as they are.
        title, formula: for people.
        parameters: constants of models bear the models' names, which are text from outside.
        points, models: how many were fitted.
        r_squared: share of the variance explained, of ln KL (of ln loss for models as they are), on the points fitted.
        spread: root mean square residual of the same logarithm.
        loss_median, loss_worst: relative error of the loss on the points fitted; see HeldOut for the error on others.
    """

    name: str
    method: str
    title: str
    formula: str
    parameters: tuple[Parameter, ...]
    points: int
    models: int
    r_squared: float
    spread: float
    loss_median: float
    loss_worst: float


def describe_form(
    suite: Suite,
    form: Form,
    method: str,
    trained: Trained,
    points: Sequence[Point],
    targets: Sequence[Target],
    kl: Array,
    delta: Array,
    ratio: Array,
    level: float,
) -> Fit:
    """A form fitted to the points of one method."""
    rows = [at for at, target in enumerate(targets) if target.region == "near" and trained.knows(target)]
    rows = [at for at in rows if points[at].model_id in trained.constants]
    measured = np.log(kl[rows, 0])
    fitted = np.array([trained.constants[points[at].model_id][0] + trained.format_part(targets[at])[0] for at in rows])
    nll = np.array([points[at].nll for at in rows])
    predicted = nll - delta[rows, 0] + ratio[0] * np.exp(fitted)
    errors = np.abs(predicted / nll - 1)
    parameters = [parameter_of(name, values, level) for name, values in zip(trained.names, trained.slopes, strict=True)]
    if form.name == "kumar":
        slope = trained.slopes[0]
        inverse = np.divide(1.0, slope, out=np.full_like(slope, math.inf), where=slope > 0)
        parameters = [parameter_of("gamma", inverse, level)]
    if form.own_constant:
        names = {model.id: model.name for model in suite.models}
        parameters += [parameter_of(f"c({names[key]})", values, level) for key, values in trained.constants.items()]
        parameters += between_parameters(trained.between, {"1": "c(any)", "N": "c, ln N", "D": "c, ln D"}, level)
    else:
        parameters += between_parameters(trained.between, {"1": "ln C", "N": "-g_N", "D": "g_D"}, level)
    return Fit(
        form.name,
        method,
        form.title,
        form.formula,
        tuple(parameters),
        len(rows),
        len(trained.constants),
        _r_squared(measured, fitted),
        math.sqrt(float(np.mean(np.square(measured - fitted)))),
        float(np.median(errors)),
        float(errors.max()),
    )


def describe_original(
    name: str,
    title: str,
    formula: str,
    parameters: Sequence[Parameter],
    models: Sequence[Model],
    nll: Array,
    predicted: Array,
) -> Fit:
    """A law of models as they are, with the losses nll (M,) and what it says of them, predicted (M,)."""
    errors = np.abs(predicted / nll - 1)
    measured, fitted = np.log(nll), np.log(predicted)
    return Fit(
        name,
        "original",
        title,
        formula,
        tuple(parameters),
        len(models),
        len(models),
        _r_squared(measured, fitted),
        math.sqrt(float(np.mean(np.square(measured - fitted)))),
        float(np.median(errors)),
        float(errors.max()),
    )


def describe_published(published: Published, models: Sequence[Model], nll: Array, level: float) -> Fit:
    """The published law fitted to models with the losses nll (M,)."""
    predicted = np.exp([published.at(model.linear_parameters, model.training_tokens)[0][0] for model in models])
    generator = np.random.default_rng(SEED)
    parameters = []
    for index, (name, values) in enumerate((("E", published.E), ("s", published.s))):
        drawn = values.copy()
        if published.degrees < 1:
            drawn[1:] = math.inf
        else:
            error = published.spread * math.sqrt(float(published.inverse[index, index]))
            drawn[1:] += error * generator.standard_t(published.degrees, size=len(drawn) - 1)
        parameters.append(parameter_of(name, drawn, level))
    a, alpha, b, beta = PUBLISHED
    formula = f"L = E + s ({a} / N^{alpha} + {b} / D^{beta})"
    title = "Hoffmann et al. (2022), their coefficients but for two"
    return describe_original("published", title, formula, parameters, models, nll, predicted)


def between_parameters(between: Between, names: Mapping[str, str], level: float) -> list[Parameter]:
    """Coefficients of a regression over models. Unless models were redrawn, their scatter is added to the text's."""
    found = []
    generator = np.random.default_rng(SEED)
    for index, name in enumerate(between.names):
        values = between.coefficients[index].copy()
        if not between.redrawn:
            if between.degrees < 1:
                values[1:] = math.inf
            else:
                error = between.spread * math.sqrt(float(between.inverse[index, index]))
                values[1:] += error * generator.standard_t(between.degrees, size=len(values) - 1)
        found.append(parameter_of(names[name], values, level))
    return found


def parameter_of(name: str, values: Array, level: float) -> Parameter:
    """A parameter from its draws (1 + R,)."""
    low, high = interval(values, level)
    return Parameter(name, float(values[0]), low, high)


def _r_squared(measured: Array, fitted: Array) -> float:
    total = float(np.square(measured - measured.mean()).sum())
    return 1 - float(np.square(measured - fitted).sum()) / total if total > 0 else math.nan
