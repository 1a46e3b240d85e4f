"""How well the laws predict what they were not fitted to.

Everything of one kind is left out, the law is fitted to the rest and asked for what was left out, one group after the
other. With a format goes its twin, if it has one (`int2` and `float2` are the same values, and so are a row and a block
that is as long). Errors are relative to the loss. What is left out matters more than the form: a format whose
neighbours were measured in the same model is easy, a model whose own loss is unknown is hard, so results are kept apart
by what was left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kbit.scaling.laws.bootstrap import Array, Draws
from kbit.scaling.laws.curves import make_curves
from kbit.scaling.laws.fitting import Trained, loss_per_kl, train
from kbit.scaling.laws.forms import FORMS, Form, target_of
from kbit.scaling.laws.suites import Model, Suite
from kbit.scaling.laws.unquantized import fit_own_loss, fit_power, fit_published
from kbit.scaling.points import ORIGINAL, Point

BETWEEN, OUTER = "a model between others", "the smallest or the largest model"
UNKNOWN_LOSS = ", its own loss unknown"
# Groups that scattered points are dealt into.
_FOLDS = 10


@dataclass(frozen=True)
class HeldOut:
    """Errors of one form where one kind of thing was left out. Fractions of the loss: 0.01 is 1 %.

    Attributes:
        method: whose points.
        form: name of the form; "interpolation" for the paper's; "nothing" for the loss of the model as it is, which
            every law must beat.
        left_out: "a format", "a width", "a data type", "a block size", "scattered points", or a kind of model.
        count: points predicted.
        unpredicted: points the form had no answer for.
        median, percentile90, worst: of the absolute error.
        worst_point: "MODEL, FORMAT" of the worst: text from outside.
        near_count, near_median, near_worst: of formats with small errors (forms.NEAR_ERROR: 3 bits and more); None of
            none.
        far_count, far_median, far_worst: of coarser formats whose codebooks do not shift the mean ("far"); the same.
        kl_factor: the factor within which half of the divergences are predicted (1.1: within 10 %); None for what
            predicts losses alone.
        by_bits: width -> (count, median, worst).
    """

    method: str
    form: str
    left_out: str
    count: int
    unpredicted: int
    median: float
    percentile90: float
    worst: float
    worst_point: str
    near_count: int
    near_median: float | None
    near_worst: float | None
    far_count: int
    far_median: float | None
    far_worst: float | None
    kl_factor: float | None
    by_bits: dict[int, tuple[int, float, float]]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        row = dict(self.__dict__)
        row["by_bits"] = {str(bits): list(values) for bits, values in self.by_bits.items()}
        return row


@dataclass(frozen=True, eq=False)
class Residuals:
    """ln(measured KL) - ln(predicted KL) of points left out, by region of the format (forms.Target.region).

    Attributes:
        spread: root mean square.
        count: how many.
    """

    spread: dict[str, float]
    count: dict[str, int]


@dataclass(frozen=True)
class _Errors:
    point: Point
    region: str
    loss: float
    log_kl: float | None


def hold_out(
    suite: Suite, method: str, points: Sequence[Point], draws: Draws
) -> tuple[list[HeldOut], dict[str, Residuals]]:
    """Judge every form on the points of one method.

    Args:
        suite: theirs.
        method: the method's name.
        points: the method's points, with a divergence above zero and the original of their model measured.
        draws: of these points and no others; only the text as it is is used.

    Returns:
        The errors; and, by form, the residuals to expect for a format that was not measured in a model that was (for
        the "format" form: was not measured in this model, but in others).
    """
    case = _Case(suite, points, draws)
    found: list[HeldOut] = []
    residuals: dict[str, Residuals] = {}
    schemes: list[tuple[str, Callable[[int], object]]] = [
        ("a format", lambda index: points[index].format),
        ("a width", lambda index: points[index].bits),
        ("a data type", lambda index: points[index].dtype),
        ("a block size", lambda index: points[index].block_size),
        ("scattered points", case.fold),
    ]
    for form in FORMS:
        for left_out, label in schemes:
            errors, missed = case.leave_out(form, label)
            _add(found, method, form.name, left_out, errors, missed)
            # What a format costs in a model is asked for where nothing of the format is known - or, for the form that
            # uses what a format did in other models, where that is known.
            if left_out == ("scattered points" if form.residuals else "a format"):
                residuals[form.name] = _residuals(errors)
        for outer in (False, True):
            for known in (True, False):
                errors, missed = case.leave_out_models(form, outer, known)
                name = (OUTER if outer else BETWEEN) + ("" if known else UNKNOWN_LOSS)
                _add(found, method, form.name, name, errors, missed)
    for outer in (False, True):
        errors, missed = case.interpolate(outer)
        _add(found, method, "interpolation", OUTER if outer else BETWEEN, errors, missed)
    _add(found, method, "nothing", "a format", case.nothing(), 0)
    return found, residuals


def hold_out_originals(models: Sequence[Model], nll: Array) -> list[HeldOut]:
    """Judge the laws of the models as they are: each model predicted from the others.

    Args:
        models: M with their own loss measured.
        nll: (M, R); column 0 is used.
    """
    found: list[HeldOut] = []
    sizes = [model.linear_parameters for model in models]
    for name, fit in (("power", fit_power), ("published", fit_published)):
        for outer in (False, True):
            errors, missed = [], 0
            for index, model in enumerate(models):
                if (model.linear_parameters in (min(sizes), max(sizes))) != outer:
                    continue
                others = [other for other in models if other.id != model.id]
                assert model.original is not None
                different = len({other.linear_parameters for other in others}) > 1
                law = fit(others, np.delete(nll, index, axis=0)[:, :1]) if different else None
                if law is None or ("D" in law.names and not model.training_tokens):
                    missed += 1
                    continue
                predicted = math.exp(float(law.at(model.linear_parameters, model.training_tokens)[0][0]))
                errors.append(_Errors(model.original, "near", abs(predicted / float(nll[index, 0]) - 1), None))
            _add(found, ORIGINAL, name, OUTER if outer else BETWEEN, errors, missed)
    return found


class _Case:
    def __init__(self, suite: Suite, points: Sequence[Point], draws: Draws) -> None:
        self.suite = suite
        self.points = points
        self.owners = [point.model_id for point in points]
        # The same codes give the same figures to the last digit.
        self.identity = [(point.model_id, point.nll, point.kl) for point in points]
        self.targets = [target_of(point) for point in points]
        self.kl = draws.kl[:, :1]
        self.log_kl = np.log(self.kl)
        self.nll = draws.nll[:, 0]
        own = {model.id: model.original.nll for model in suite.models if model.original is not None}
        self.own = np.array([own[owner] for owner in self.owners])
        self.delta = self.nll - self.own
        self.with_original = [model for model in suite.models if model.original is not None]
        self._fold = np.random.default_rng(0).permutation(len(points)) % _FOLDS

    def fold(self, index: int) -> object:
        return int(self._fold[index])

    def fit(self, form: Form, rows: Sequence[int]) -> tuple[Trained, float] | None:
        targets = [self.targets[index] for index in rows]
        trained = train(
            form, self.suite.models, [self.owners[index] for index in rows], targets, self.log_kl[list(rows)]
        )
        near = [index for index, target in zip(rows, targets, strict=True) if target.region == "near"]
        if trained is None or not near:
            return None
        return trained, float(loss_per_kl(self.delta[near, None], self.kl[near])[0][0])

    def leave_out(self, form: Form, label: Callable[[int], object]) -> tuple[list[_Errors], int]:
        everything = range(len(self.points))
        errors: list[_Errors] = []
        missed = 0
        groups = dict.fromkeys(label(index) for index in everything)
        if len(groups) < 2:
            return [], 0
        for group in groups:
            out = [index for index in everything if label(index) == group]
            same = {self.identity[index] for index in out}
            fitted = self.fit(form, [index for index in everything if self.identity[index] not in same])
            for index in out:
                owner = self.owners[index]
                if fitted is None or owner not in fitted[0].constants or not fitted[0].knows(self.targets[index]):
                    missed += 1
                    continue
                constant = float(fitted[0].constants[owner][0])
                errors.append(self._error(index, fitted, constant, float(self.own[index])))
        return errors, missed

    def leave_out_models(self, form: Form, outer: bool, known: bool) -> tuple[list[_Errors], int]:
        errors: list[_Errors] = []
        missed = 0
        for model, out, rest in self._models(outer):
            fitted = self.fit(form, rest)
            others = [other for other in self.with_original if other.id != model.id]
            if fitted is None or (not known and len(others) < 2):
                missed += len(out)
                continue
            try:
                constant = float(fitted[0].between.at(model.linear_parameters, model.training_tokens)[0][0])
                loss = model.original.nll if model.original is not None else math.nan
                if not known:
                    losses = np.array([[other.original.nll] for other in others if other.original is not None])
                    law = (fit_own_loss if model.training_tokens else fit_power)(others, losses)
                    loss = math.exp(law.at(model.linear_parameters, model.training_tokens)[0][0])
            except ValueError:
                missed += len(out)
                continue
            for index in out:
                if fitted[0].knows(self.targets[index]):
                    errors.append(self._error(index, fitted, constant, loss))
                else:
                    missed += 1
        return errors, missed

    def interpolate(self, outer: bool) -> tuple[list[_Errors], int]:
        errors: list[_Errors] = []
        missed = 0
        for _, out, rest in self._models(outer):
            curves = {
                curve.format: curve
                for curve in make_curves([self.points[index] for index in rest], "linear", self.nll[rest])
            }
            for index in out:
                point = self.points[index]
                curve = curves.get(point.format)
                at = np.log([float(point.linear_bits)])
                read = math.nan if curve is None else float(curve.read(self.nll[rest, None], at)[0][0, 0])
                if not math.isfinite(read):
                    missed += 1
                    continue
                error = abs(read / float(self.nll[index]) - 1)
                errors.append(_Errors(point, self.targets[index].region, error, None))
        return errors, missed

    def nothing(self) -> list[_Errors]:
        ratios = np.abs(self.own / self.nll - 1)
        return [
            _Errors(point, target.region, float(ratio), None)
            for point, target, ratio in zip(self.points, self.targets, ratios, strict=True)
        ]

    def _models(self, outer: bool) -> list[tuple[Model, list[int], list[int]]]:
        """(model, its points, all others) of the models at the ends, or of those between."""
        present = [model for model in self.suite.models if model.id in set(self.owners)]
        if len(present) < 2:
            return []
        sizes = [model.linear_parameters for model in present]
        chosen = [model for model in present if (model.linear_parameters in (min(sizes), max(sizes))) == outer]
        everything = range(len(self.points))
        return [
            (
                model,
                [index for index in everything if self.owners[index] == model.id],
                [index for index in everything if self.owners[index] != model.id],
            )
            for model in chosen
        ]

    def _error(self, index: int, fitted: tuple[Trained, float], constant: float, loss: float) -> _Errors:
        trained, r = fitted
        log_kl = constant + float(trained.format_part(self.targets[index])[0])
        predicted = loss + r * math.exp(min(log_kl, 50.0))
        error = abs(predicted / float(self.nll[index]) - 1)
        return _Errors(self.points[index], self.targets[index].region, error, float(self.log_kl[index, 0]) - log_kl)


def _residuals(errors: Sequence[_Errors]) -> Residuals:
    spread: dict[str, float] = {}
    count: dict[str, int] = {}
    for region in ("near", "far", "shifted"):
        own = [error.log_kl for error in errors if error.region == region and error.log_kl is not None]
        if own:
            spread[region] = math.sqrt(float(np.mean(np.square(own))))
            count[region] = len(own)
    return Residuals(spread, count)


def _add(found: list[HeldOut], method: str, form: str, left_out: str, errors: Sequence[_Errors], missed: int) -> None:
    if not errors:
        return
    loss = np.array([error.loss for error in errors])
    near = np.array([error.loss for error in errors if error.region == "near"])
    far = np.array([error.loss for error in errors if error.region == "far"])
    log_kl = [abs(error.log_kl) for error in errors if error.log_kl is not None]
    worst = errors[int(loss.argmax())].point
    by_bits: dict[int, tuple[int, float, float]] = {}
    for bits in sorted({error.point.bits for error in errors}):
        own: Array = np.array([error.loss for error in errors if error.point.bits == bits])
        by_bits[bits] = (len(own), float(np.median(own)), float(own.max()))
    found.append(
        HeldOut(
            method,
            form,
            left_out,
            len(errors),
            missed,
            float(np.median(loss)),
            float(np.percentile(loss, 90)),
            float(loss.max()),
            f"{worst.model}, {worst.format}",
            len(near),
            float(np.median(near)) if len(near) else None,
            float(near.max()) if len(near) else None,
            len(far),
            float(np.median(far)) if len(far) else None,
            float(far.max()) if len(far) else None,
            math.exp(float(np.median(log_kl))) if log_kl else None,
            by_bits,
        )
    )
