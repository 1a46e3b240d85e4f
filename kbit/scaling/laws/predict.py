"""What a model in a format would lose, from what was measured: the measured row where there is one, else the laws.

The interval of a prediction has four parts: the text (redrawn); how far formats lie from the form used, as seen when
formats were left out (laws.heldout); for a model that was not measured, how far models lie from what the others
say of them, with as few degrees of freedom as there are models; and the first-order part of the loss that no divergence
shows (laws.fitting.loss_per_kl). Each is drawn, and percentiles are taken of the sum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from kbit.evaluate.statistics import SEED
from kbit.formats.quant_format import QuantFormat
from kbit.formats.registry import parse_format
from kbit.host.errors import KbitError, UsageError
from kbit.scaling.laws.bootstrap import Array, interval
from kbit.scaling.laws.fit import Laws, MethodLaws, SuiteLaws
from kbit.scaling.laws.fitting import Between, Trained
from kbit.scaling.laws.forms import Target, target
from kbit.scaling.laws.gaussian import ROW
from kbit.scaling.laws.suites import Model
from kbit.scaling.laws.unquantized import Published
from kbit.scaling.points import ORIGINAL, Point

# exp of this is far beyond any loss; it only keeps the arithmetic finite.
_LARGEST = 50.0
MEASURED = "measured"


@dataclass(frozen=True)
class Query:
    """What to predict.

    Attributes:
        format: a format string, or ORIGINAL.
        method: how codes are found.
        model: name or fingerprint of a model in the points; None for a model that was not measured.
        tokenizer: digest of the tokenizer of a model that was not measured: chooses the suite; None takes the first.
        linear_parameters: N of a model that was not measured.
        training_tokens: its D, if known.
        original_nll: its loss as it is in nats per token on the suite's text, if known.
        weight_error: relative squared error of its weights in the format, if they were quantized.
        expected_kl: what this error costs to second order (kbit.evaluate.fisher), if that is known.
    """

    format: str
    method: str = "rtn"
    model: str | None = None
    tokenizer: str | None = None
    linear_parameters: int | None = None
    training_tokens: int | None = None
    original_nll: float | None = None
    weight_error: float | None = None
    expected_kl: float | None = None


@dataclass(frozen=True, eq=False)
class Prediction:
    """A loss with its interval, at the laws' level.

    Attributes:
        nll, nll_low, nll_high: nats per token; the interval is for other text of the kind.
        delta, delta_low, delta_high: loss above that of the model as it is, NaN if that was not measured. Narrower,
            since the text's difficulty cancels: the one to compare formats of a model by.
        kl, kl_low, kl_high: divergence from the model as it is, nats per token.
        basis: MEASURED, or the name of the form used (that of the law of models as they are, where only this loss was
            asked for).
        extrapolated: in what way this lies beyond what was measured; empty if it does not.
        laws: the suite asked.
        nll_draws, delta_draws: (1 + R,) what the intervals are taken of; predictions of one suite share the draws of
            the text.
    """

    nll: float
    nll_low: float
    nll_high: float
    delta: float
    delta_low: float
    delta_high: float
    kl: float
    kl_low: float
    kl_high: float
    basis: str
    extrapolated: tuple[str, ...]
    laws: SuiteLaws
    nll_draws: Array
    delta_draws: Array

    @property
    def nll_per_byte(self) -> float:
        """Nats per byte of text: compares between tokenizers on the same text."""
        return self.nll * self.laws.suite.tokens_per_byte


def predict(laws: Laws, query: Query) -> Prediction:
    """Predict a loss.

    Raises:
        UsageError: the query contradicts itself or names no format.
        KbitError: nothing measured bears on it; the message says what to measure.
    """
    own = _choose(laws, query)
    model = own.suite.model(query.model) if query.model is not None else None
    format = _known_name(own, query.format)
    if model is not None:
        method = ORIGINAL if format == ORIGINAL else query.method
        for index, point in enumerate(own.suite.points):
            if (point.model_id, point.method, point.format) == (model.id, method, format):
                return _measured(own, model, index, point)
    extrapolated: list[str] = []
    generator = np.random.default_rng([SEED, *format.encode()])
    loss = _own_loss(own, model, query, generator)
    if model is None and query.linear_parameters is not None:
        extrapolated += _beyond(own, query.linear_parameters, query.training_tokens)
    if format == ORIGINAL:
        zero = np.zeros_like(loss)
        return _prediction(own, loss, zero, zero, _own_basis(own, model, query), extrapolated)
    methods = own.methods.get(query.method)
    if methods is None:
        known = ", ".join(own.methods) or "none"
        raise KbitError(
            f"no law for the method {query.method!r} on {own.suite.name}: methods with one: {known}; measure some "
            "formats of 3 bits and more with it, by kbit scale"
        )
    error = query.weight_error or _known_error(own, query.method, format)
    wanted = target(format, query.method, error, query.expected_kl)
    form, spread, degrees = _best_form(methods, wanted)
    trained = methods.trained[form]
    log_kl = trained.format_part(wanted) + _constant(trained, model, query, generator, extrapolated)
    log_kl = _disturbed(log_kl, spread, degrees, generator)
    _mark(own, wanted, query.method, format, extrapolated)
    kl = np.exp(np.minimum(log_kl, _LARGEST))
    delta = methods.loss_per_kl * kl
    delta[1:] += methods.scatter * np.sqrt(kl[1:]) * generator.standard_normal(len(kl) - 1)
    return _prediction(own, loss, delta, kl, form, extrapolated)


def _known_name(own: SuiteLaws, format: str) -> str:
    """A format as points call it: as it was measured, or as its codec writes it.

    Raises:
        UsageError: it is none.
    """
    measured = any(point.format == format for point in own.suite.points)
    return format if measured or format == ORIGINAL else str(parse_format(format))


def _choose(laws: Laws, query: Query) -> SuiteLaws:
    if query.weight_error is not None and not 0 < query.weight_error < math.inf:
        raise UsageError(f"weight error {query.weight_error}: it is a positive fraction, as in 0.008")
    if query.expected_kl is not None and not 0 < query.expected_kl < math.inf:
        raise UsageError(f"expected divergence {query.expected_kl}: it is a positive number of nats per token")
    if query.original_nll is not None and not 0 < query.original_nll < math.inf:
        raise UsageError(f"loss {query.original_nll}: it is a positive number of nats per token")
    if query.linear_parameters is not None and query.linear_parameters < 1:
        raise UsageError(f"{query.linear_parameters} parameters: a model has at least one")
    if query.training_tokens is not None and query.training_tokens < 1:
        raise UsageError(
            f"{query.training_tokens} training tokens: give at least one, or none where they are not known"
        )
    own = laws.suite(model=query.model, tokenizer=query.tokenizer)
    if own is not None:
        return own
    if not laws.suites:
        raise KbitError("there are no measured points to predict from: measure some, by kbit scale")
    if query.model is not None:
        raise KbitError(
            f"{query.model!r} is not among the measured models, or several have its name: give its size instead"
        )
    raise KbitError("no model with this tokenizer was measured: losses per token of other tokenizers do not compare")


def _own_loss(own: SuiteLaws, model: Model | None, query: Query, generator: np.random.Generator) -> Array:
    """Loss of the model as it is, (1 + R,)."""
    if model is not None:
        for index, point in enumerate(own.suite.points):
            if point.is_original and point.model_id == model.id:
                measured: Array = own.draws.nll[index]
                return measured
        raise KbitError(
            f"{model.name}: its loss as it is was not measured on {own.suite.name}: measure it, by kbit scale"
        )
    if query.original_nll is not None:
        return np.full(1 + own.draws.count, query.original_nll)
    if own.power is None or query.linear_parameters is None:
        raise KbitError(
            "the loss of a model that was not measured needs its number of parameters, and two measured models of "
            "other sizes with its tokenizer; or give its loss"
        )
    n, tokens = query.linear_parameters, query.training_tokens
    try:
        law = _own_law(own, tokens)
        log_loss, error = law.at(n, tokens)
    except ValueError as problem:
        raise KbitError(f"the loss of a model of {n} parameters that was not measured: {problem}") from None
    loss: Array = np.exp(np.minimum(_disturbed(log_loss, error, law.degrees, generator), _LARGEST))
    return loss


def _own_basis(own: SuiteLaws, model: Model | None, query: Query) -> str:
    if model is not None:
        return MEASURED
    return "published" if own.published is not None and query.training_tokens else "power"


def _own_law(own: SuiteLaws, training_tokens: int | None) -> Between | Published:
    """The law for the loss of a model that was not measured.

    Raises:
        ValueError: there is none.
    """
    if own.published is not None and training_tokens:
        return own.published
    if own.power is None:
        raise ValueError("no two models of other sizes were measured")
    return own.power


def _constant(
    trained: Trained, model: Model | None, query: Query, generator: np.random.Generator, extrapolated: list[str]
) -> Array:
    """The model's part of ln KL, (1 + R,)."""
    if model is not None and model.id in trained.constants:
        return trained.constants[model.id]
    n = model.linear_parameters if model is not None else query.linear_parameters
    tokens = model.training_tokens if model is not None else query.training_tokens
    try:
        constant, error = trained.between.at(n, tokens)
    except ValueError as problem:
        raise KbitError(f"what a format costs a model that was not measured: {problem}") from None
    if trained.between.degrees < 1:
        extrapolated.append("one model measured: how much models differ is not known")
    return _disturbed(constant, error, trained.between.degrees, generator)


def _best_form(methods: MethodLaws, wanted: Target) -> tuple[str, float, int]:
    """(name, spread of ln KL, how many residuals it comes from) of the form that predicts such formats best."""
    region = wanted.region
    best: tuple[str, float, int] | None = None
    for name, trained in methods.trained.items():
        if not trained.knows(wanted):
            continue
        residuals = methods.residuals.get(name)
        spread = residuals.spread.get(region, math.inf) if residuals is not None else math.inf
        count = residuals.count.get(region, 0) if residuals is not None else 0
        if best is None or spread < best[1]:
            best = (name, spread, count)
    if best is None:
        raise KbitError(f"no law has an answer for {wanted.format}: measure it, by kbit scale")
    return best


def _disturbed(values: Array, spread: float, degrees: int, generator: np.random.Generator) -> Array:
    """Draws (column 0 left as it is) with a Student-t number of the given spread added."""
    disturbed: Array = values.copy()
    if degrees < 1 or not math.isfinite(spread):
        # Nobody knows: half of the draws go to either end, so that every percentile interval is unbounded.
        disturbed[1::2], disturbed[2::2] = -math.inf, math.inf
        return disturbed
    disturbed[1:] += spread * generator.standard_t(degrees, size=len(values) - 1)
    return disturbed


def _known_error(own: SuiteLaws, method: str, format: str) -> float | None:
    """Error of the weights in a format, as other models have it: the geometric mean."""
    errors = [
        p.weight_error for p in own.suite.points if (p.method, p.format) == (method, format) and p.weight_error > 0
    ]
    return math.exp(float(np.log(errors).mean())) if errors else None


def _mark(own: SuiteLaws, wanted: Target, method: str, format: str, extrapolated: list[str]) -> None:
    """What is unlike anything that was measured."""
    points = [point for point in own.suite.points if point.method == method]
    if any(point.format == format for point in points):
        return  # measured, in other models
    if wanted.region == "shifted":
        extrapolated.append(f"{format} shifts the mean of the weights, which its error does not show")
    elif wanted.region == "far":
        extrapolated.append(f"{format} rounds more coarsely than the laws hold for")
    parsed = parse_format(format)
    if wanted.error is None and isinstance(parsed, QuantFormat) and parsed.block_size == 0:
        extrapolated.append(f"{format}: its error depends on the length of the rows, which is taken to be {ROW}")
    widths = [point.bits for point in points]
    if not min(widths) <= wanted.bits <= max(widths):
        extrapolated.append(f"{wanted.bits} bits: measured were {min(widths)} to {max(widths)}")


def _beyond(own: SuiteLaws, n: int, tokens: int | None) -> list[str]:
    reasons = []
    models = [model for model in own.suite.models if model.original is not None]
    sizes = [model.linear_parameters for model in models]
    if sizes and not min(sizes) <= n <= max(sizes):
        reasons.append(f"{n} parameters: measured were {min(sizes)} to {max(sizes)}")
    trained = [model.training_tokens for model in models if model.training_tokens]
    if tokens and trained and not min(trained) <= tokens <= max(trained):
        reasons.append(f"{tokens} training tokens: measured were {min(trained)} to {max(trained)}")
    return reasons


def _measured(own: SuiteLaws, model: Model, index: int, point: Point) -> Prediction:
    nll, kl = own.draws.nll[index], own.draws.kl[index]
    for other, original in enumerate(own.suite.points):
        if original.is_original and original.model_id == model.id:
            return _prediction(own, own.draws.nll[other], nll - own.draws.nll[other], kl, MEASURED, [])
    result = _prediction(own, nll, np.zeros_like(nll), kl, MEASURED, [])
    unknown = np.full_like(nll, math.nan)
    return replace(result, delta=math.nan, delta_low=-math.inf, delta_high=math.inf, delta_draws=unknown)


def _prediction(
    own: SuiteLaws, loss: Array, delta: Array, kl: Array, basis: str, extrapolated: list[str]
) -> Prediction:
    nll = loss + delta
    nll_low, nll_high = _percentiles(nll, own.level)
    delta_low, delta_high = _percentiles(delta, own.level)
    kl_low, kl_high = _percentiles(kl, own.level)
    return Prediction(
        nll=float(nll[0]),
        nll_low=nll_low,
        nll_high=nll_high,
        delta=float(delta[0]),
        delta_low=delta_low,
        delta_high=delta_high,
        kl=float(kl[0]),
        kl_low=kl_low,
        kl_high=kl_high,
        basis=basis,
        extrapolated=tuple(dict.fromkeys(extrapolated)),
        laws=own,
        nll_draws=nll,
        delta_draws=delta,
    )


def _percentiles(values: Array, level: float) -> tuple[float, float]:
    drawn = values[1:]
    if np.isfinite(drawn).all() and (len(drawn) == 0 or drawn.max() < math.exp(_LARGEST) / 2):
        return interval(values, level)
    return -math.inf, math.inf
