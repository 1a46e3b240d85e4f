"""Laws fitted to a table of measured points: loss = L16(N, D) + delta(format, method, N, D).

`fit_laws` takes the rows of one or many sweeps, sorts them into suites that may be compared (laws.suites), and
for each suite fits the forms for delta (laws.forms) and for the models as they are (laws.unquantized),
judges all of them on what they were not fitted to (laws.heldout) and finds the best widths at every budget
(laws.best_width). Everything carries an interval from redrawing the text (laws.bootstrap).
`laws.predict` asks the result.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from kbit.evaluate.statistics import SEED
from kbit.host.errors import UsageError
from kbit.host.json_values import finite
from kbit.scaling.laws.best_width import BestWidths, best_widths
from kbit.scaling.laws.bootstrap import DRAWS, LEVEL, Array, Draws, interval, redraw, redraw_models, times_of
from kbit.scaling.laws.describe import Fit as Fit
from kbit.scaling.laws.describe import Parameter as Parameter
from kbit.scaling.laws.describe import (
    between_parameters,
    describe_form,
    describe_original,
    describe_published,
    parameter_of,
)
from kbit.scaling.laws.fitting import Between, Trained, loss_per_kl, train
from kbit.scaling.laws.forms import FORMS, SENSITIVITY, target_of
from kbit.scaling.laws.heldout import HeldOut, Residuals, hold_out, hold_out_originals
from kbit.scaling.laws.suites import FEW_CLUSTERS, Suite, make_suites
from kbit.scaling.laws.unquantized import (
    MIN_MODELS_CHINCHILLA,
    Published,
    fit_chinchilla,
    fit_power,
    fit_published,
)
from kbit.scaling.points import Point

# Divergences below this are rounding noise of the arithmetic, not a cost of the format.
MIN_KL = 1e-9


@dataclass(frozen=True, eq=False)
class MethodLaws:
    """What predictions for a method are made of.

    Attributes:
        trained: the fitted forms by name.
        residuals: by form, what to expect of formats that were not measured.
        loss_per_kl: (1 + R,) see fitting.loss_per_kl.
        scatter: tau of the same.
    """

    trained: Mapping[str, Trained]
    residuals: Mapping[str, Residuals]
    loss_per_kl: Array
    scatter: float


@dataclass(frozen=True, eq=False)
class SuiteLaws:
    """The laws of one suite.

    Attributes:
        suite: the points.
        draws: of the suite's points, in order.
        fits: all fitted forms.
        heldout: how they predict what they were not fitted to.
        best: the best widths by axis, method and data type.
        missing: what was not fitted, and why.
        methods: what predictions are made of, by method.
        power: the power law of the models as they are, or None.
        published: what predicts them better while models are few (laws.unquantized), or None.
        level: of the intervals.
    """

    suite: Suite
    draws: Draws
    fits: tuple[Fit, ...]
    heldout: tuple[HeldOut, ...]
    best: tuple[BestWidths, ...]
    missing: tuple[str, ...]
    methods: Mapping[str, MethodLaws]
    power: Between | None
    published: Published | None
    level: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        ratios = {}
        for method, laws in self.methods.items():
            low, high = interval(laws.loss_per_kl, self.level)
            ratios[method] = {"value": float(laws.loss_per_kl[0]), "low": low, "high": high, "scatter": laws.scatter}
        return {
            "name": self.suite.name,
            "tokenizer": self.suite.tokenizer,
            "clusters": self.suite.clusters,
            "tokens_per_byte": self.suite.tokens_per_byte,
            "models": [
                {
                    "id": model.id,
                    "name": model.name,
                    "linear_parameters": model.linear_parameters,
                    "parameters": model.parameters,
                    "training_tokens": model.training_tokens,
                    "nll": model.original.nll if model.original is not None else None,
                }
                for model in self.suite.models
            ],
            "points": len(self.suite.points),
            "loss_per_kl": ratios,
            "fits": [asdict(fit) for fit in self.fits],
            "heldout": [held.to_dict() for held in self.heldout],
            "best": [best.to_dict() for best in self.best],
            "missing": list(self.missing),
        }


@dataclass(frozen=True, eq=False)
class Laws:
    """All suites' laws.

    Attributes:
        suites: the one with most models first.
        notes: what was left out of the table, and why.
        level: of all intervals.
        draws: R.
    """

    suites: tuple[SuiteLaws, ...]
    notes: tuple[str, ...]
    level: float
    draws: int

    def suite(self, *, model: str | None = None, tokenizer: str | None = None) -> SuiteLaws | None:
        """The first suite that has a model (by name or fingerprint) or a tokenizer; without either, the first."""
        for laws in self.suites:
            if model is not None and laws.suite.model(model) is None:
                continue
            if tokenizer is not None and laws.suite.tokenizer != tokenizer:
                continue
            return laws
        return None

    def to_dict(self) -> dict[str, Any]:
        """For JSON: numbers that are infinite or undefined are None."""
        row = {
            "level": self.level,
            "draws": self.draws,
            "notes": list(self.notes),
            "suites": [laws.to_dict() for laws in self.suites],
        }
        cleaned: dict[str, Any] = finite(row)
        return cleaned


def fit_laws(points: Iterable[Point], *, draws: int = DRAWS, seed: int = SEED, level: float = LEVEL) -> Laws:
    """Fit everything that the points allow; what they do not allow is said in `notes` and `missing`.

    Args:
        points: rows of one or many sweeps, in any order; none at all gives laws without suites.
        draws: redraws of the text.
        seed: of the draws.
        level: of the intervals, between 0 and 1.

    Raises:
        UsageError: draws or level are out of range.
    """
    if draws < 1:
        raise UsageError(f"{draws} draws: at least 1 is needed, and about 1000 for a 95 % interval")
    if not 0 < level < 1:
        raise UsageError(f"level {level}: it lies between 0 and 1, as in 0.95")
    suites, notes = make_suites(points)
    return Laws(tuple(_fit_suite(suite, draws, seed, level) for suite in suites), tuple(notes), level, draws)


def _fit_suite(suite: Suite, draws: int, seed: int, level: float) -> SuiteLaws:
    drawn = redraw(suite.points, draws, seed)
    missing: list[str] = []
    if suite.clusters < FEW_CLUSTERS:
        missing.append(f"only {suite.clusters} clusters of text: intervals are rough")
    own = {model.id: model.original for model in suite.models if model.original is not None}
    missing += [f"{model.name}: its loss as it is was not measured" for model in suite.models if model.id not in own]
    fits: list[Fit] = []
    heldout: list[HeldOut] = []
    methods: dict[str, MethodLaws] = {}
    times = redraw_models(len(suite.models), draws, seed)
    for method in suite.methods:
        rows = [
            index
            for index, point in enumerate(suite.points)
            if point.method == method and point.kl > MIN_KL and drawn.kl[index].min() > 0 and point.model_id in own
        ]
        laws = _fit_method(suite, method, rows, drawn, times, fits, heldout, missing, level)
        if laws is not None:
            methods[method] = laws
    power, published = fit_originals(suite, drawn, times, fits, heldout, missing, level)
    best = best_widths(suite, drawn, level)
    return SuiteLaws(
        suite, drawn, tuple(fits), tuple(heldout), tuple(best), tuple(missing), methods, power, published, level
    )


def _fit_method(
    suite: Suite,
    method: str,
    rows: Sequence[int],
    drawn: Draws,
    times: Array | None,
    fits: list[Fit],
    heldout: list[HeldOut],
    missing: list[str],
    level: float,
) -> MethodLaws | None:
    points = [suite.points[row] for row in rows]
    targets = [target_of(point) for point in points]
    near = [at for at, target in enumerate(targets) if target.region == "near"]
    if not near:
        missing.append(f"{method}: no format of at least 3 bits, or no loss of a model as it is: no law")
        return None
    kl = drawn.kl[rows]
    position = {point.model_id: index for index, point in enumerate(suite.points) if point.is_original}
    delta = drawn.nll[rows] - drawn.nll[[position[point.model_id] for point in points]]
    ratio, scatter = loss_per_kl(delta[near], kl[near])
    owners = [point.model_id for point in points]
    trained: dict[str, Trained] = {}
    for form in FORMS:
        found = train(form, suite.models, owners, targets, np.log(kl), times)
        if found is None:
            why = "too few points or widths"
            if form is SENSITIVITY and not all(target.expected_kl for target in targets):
                why = "points were measured without gradients of the model as it is"
            missing.append(f'{method}: "{form.name}" ({form.title}): {why}')
            continue
        trained[form.name] = found
        fits.append(describe_form(suite, form, method, found, points, targets, kl, delta, ratio, level))
    errors, residuals = hold_out(suite, method, points, drawn.only(rows))
    heldout += errors
    return MethodLaws(trained, residuals, ratio, scatter)


def fit_originals(
    suite: Suite,
    drawn: Draws,
    times: Array | None,
    fits: list[Fit],
    heldout: list[HeldOut],
    missing: list[str],
    level: float,
) -> tuple[Between | None, Published | None]:
    """The laws of the models as they are: the power law; and the published one, where it is the one to predict with."""
    models = [model for model in suite.models if model.original is not None]
    if len({model.linear_parameters for model in models}) < 2:
        missing.append("models as they are: a law of the size needs two sizes")
        return None, None
    rows = [index for model in models for index, point in enumerate(suite.points) if point is model.original]
    nll = drawn.nll[rows]
    chosen = [index for index, model in enumerate(suite.models) if model.original is not None]
    own_times = times_of(times, chosen)
    power = fit_power(models, nll, own_times)
    fitted = np.array([power.at(model.linear_parameters, model.training_tokens)[0][0] for model in models])
    names = {"1": "ln a", "N": "b (with d = 0)", "D": "c (with d = 0)"}
    parameters = between_parameters(power, names, level)
    title = "power law of parameters and training tokens"
    formula = "L = a N^b D^c C^d, C = 6 N D"
    fits.append(describe_original("power", title, formula, parameters, models, nll[:, 0], np.exp(fitted)))
    if power.degrees < 1:
        missing.append(
            f'models as they are: "power" has {len(power.names)} coefficients for {len(models)} models: it runs '
            "through them, and nothing can be said of how well it predicts another"
        )
    published = fit_published(models, nll)
    if published is None:
        missing.append('models as they are: "published" needs training tokens, and sizes that differ')
    else:
        fits.append(describe_published(published, models, nll[:, 0], level))
    heldout += hold_out_originals(models, nll)
    big = fit_chinchilla(models, nll)
    if big is None:
        missing.append(
            f'models as they are: "chinchilla" (five coefficients) needs {MIN_MODELS_CHINCHILLA} models with '
            f"different N and D; there are {len(models)}"
        )
    else:
        parameters = [parameter_of(name, values, level) for name, values in big.__dict__.items()]
        predicted = np.array([big.at(model.linear_parameters, model.training_tokens or 1)[0] for model in models])
        title, formula = "Hoffmann et al. (2022), in Kumar et al. (2024)", "L = E + A / N^alpha + B / D^beta"
        fits.append(describe_original("chinchilla", title, formula, parameters, models, nll[:, 0], predicted))
    return power, published if len(models) < MIN_MODELS_CHINCHILLA else None
