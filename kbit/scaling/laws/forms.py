"""Forms of the law for what quantizing costs: ln KL as a sum of a model's part and a format's part.

KL is the mean divergence from the model as it is. It is fitted instead of the difference of losses because it is the
same quantity without the noise: for a model that predicts its text as well as it claims, the expected difference IS the
divergence, but the text adds its luck to the difference, and from five bits on the luck is the larger part
(fitting.loss_per_kl relates the two). The forms:

- "error":    ln KL = c(model) + s ln e + q e. e is the relative squared error of the weights. To first order the
  divergence is proportional to e, so s = 1 is expected (the linearity theorem of Malinovskii et al., "HIGGS", 2024); q
  says how it grows faster when errors are large. A format enters through its error alone, as in Panferov et al. (2025).
- "gaussian": the same with the error of the format on normal weights, which needs no model (laws.gaussian).
- "format":   "error", and what is left over for each format averaged over the models in which it was measured.
- "bits":     ln KL = c(model) + a(data type) - kappa b, b the stored bits per weight.
- "kumar":    ln KL = ln C + g_D ln D - g_N ln N - P / gamma, with P = k: the form of Kumar et al., "Scaling Laws for
  Precision" (2024), section 3, for quantization after training. It knows no data types, and no model has a constant of
  its own.

The model's part of the other forms, c, is regressed on ln N and ln D over the models, for models that were not
measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kbit.errors import UsageError
from kbit.formats.quant_format import QuantFormat
from kbit.scaling.laws.gaussian import gaussian_rounding
from kbit.scaling.points import ORIGINAL, Point
from kbit.scaling.sweep.grid import dtype_label

# The largest relative error of the weights that laws are fitted to: 3-bit formats stay below it. On the novels family
# the law of the error misses the divergence by 3 % (root mean square) up to here, by up to 25 % at 0.12 to 0.2 (the
# better 2-bit formats), and is no guide at 0.3 and above, where more than the size of the error matters.
NEAR_ERROR = 0.1
# A mean error (see gaussian.Rounding.shift) whose square is this share of the whole error adds up along a row of 100 or
# more weights to as much as the rest of it: nf2 has 0.05 and loses up to eight times what its error says.
MAX_SHIFT_SHARE = 0.01
# Exponent and curvature are told apart where the largest error is more than this times the smallest: a width has a
# quarter of the error of the next narrower one, so it takes four widths or so.
_SPAN_FOR_CURVATURE = 30.0


@dataclass(frozen=True)
class Target:
    """A format as the forms see it.

    Attributes:
        format, method, dtype, bits: as in Point.
        bits_per_weight: of the linear layers.
        error: relative squared error of the weights, or None if they were not quantized.
        gaussian: the same of normal weights, or None where the format is not one of kbit's own.
    """

    format: str
    method: str
    dtype: str
    bits: int
    bits_per_weight: float
    error: float | None
    gaussian: float | None

    @property
    def region(self) -> str:
        """Where the format lies: "near" (laws are fitted here), "far" (a large error) or "shifted" (a biased one)."""
        try:
            rounding = gaussian_rounding(self.format)
        except UsageError:  # a method's own format
            rounding = None
        if rounding is not None and rounding.shift**2 > MAX_SHIFT_SHARE * rounding.error:
            return "shifted"
        error = self.error if self.error is not None else self.gaussian
        return "near" if error is not None and error <= NEAR_ERROR else "far"


def target_of(point: Point) -> Target:
    """The format of a measured point."""
    return Target(
        point.format,
        point.method,
        point.dtype,
        point.bits,
        point.bits_per_weight,
        point.weight_error if point.weight_error > 0 else None,
        _gaussian(point.format),
    )


def target(format: str, method: str, weight_error: float | None = None) -> Target:
    """A format that was not measured.

    Raises:
        UsageError: not a format string.
    """
    parsed = QuantFormat.parse(format)
    name, dtype = str(parsed), dtype_label(parsed)
    rounding = gaussian_rounding(name)
    return Target(name, method, dtype, parsed.bits, rounding.bits_per_weight, weight_error, rounding.error)


def _gaussian(format: str) -> float | None:
    if format == ORIGINAL:
        return None
    try:
        return gaussian_rounding(format).error
    except UsageError:  # a method's own format
        return None


# A format's part of ln KL: a fixed term, and features whose coefficients are fitted; None where the form has no answer.
Encoded = tuple[float, tuple[float, ...]]
Encode = Callable[[Target], "Encoded | None"]


@dataclass(frozen=True)
class Form:
    """A form of the law.

    Attributes:
        name, title, formula: for people.
        own_constant: whether every measured model has a constant of its own.
        residuals: whether a format's mean residual over the models is added.
        encoder: (formats in the fit) -> (names of the coefficients, encode).
    """

    name: str
    title: str
    formula: str
    own_constant: bool
    residuals: bool
    encoder: Callable[[Sequence[Target]], tuple[tuple[str, ...], Encode]]


def _from_error(read: Callable[[Target], float | None]) -> Callable[[Sequence[Target]], tuple[tuple[str, ...], Encode]]:
    def encoder(targets: Sequence[Target]) -> tuple[tuple[str, ...], Encode]:
        errors = [error for error in map(read, targets) if error]
        widths = len({target.bits for target in targets})
        curved = bool(errors) and widths > 2 and max(errors) > _SPAN_FOR_CURVATURE * min(errors)

        def encode(target: Target) -> Encoded | None:
            error = read(target)
            if not error:
                return None
            if widths < 2:  # errors of one width lie too close together to show an exponent: it is the theory's, 1
                return math.log(error), ()
            return 0.0, (math.log(error), error) if curved else (math.log(error),)

        return (() if widths < 2 else ("s", "q") if curved else ("s",)), encode

    return encoder


def _bits_encoder(targets: Sequence[Target]) -> tuple[tuple[str, ...], Encode]:
    dtypes = list(dict.fromkeys(target.dtype for target in targets))
    others = dtypes[1:]

    def encode(target: Target) -> Encoded | None:
        # A data type without a constant of its own gets the mean of the others'.
        if target.dtype in dtypes:
            constants = tuple(float(target.dtype == dtype) for dtype in others)
        else:
            constants = tuple(1 / len(dtypes) for _ in others)
        return 0.0, (-target.bits_per_weight, *constants)

    return ("kappa", *(f"a({dtype}) - a({dtypes[0]})" for dtype in others)), encode


def _kumar_encoder(targets: Sequence[Target]) -> tuple[tuple[str, ...], Encode]:
    return ("1/gamma",), lambda target: (0.0, (-float(target.bits),))


_BY_ERROR = _from_error(lambda target: target.error)

_BY_GAUSSIAN = _from_error(lambda target: target.gaussian)

# name, title, formula, own_constant, residuals, encoder
FORMS = (
    Form(
        "format",
        "error of the weights, and each format's own factor",
        "ln KL = c(model) + s ln e + q e + u(format)",
        True,
        True,
        _BY_ERROR,
    ),
    Form("error", "error of the weights", "ln KL = c(model) + s ln e + q e", True, False, _BY_ERROR),
    Form("gaussian", "error on normal weights", "ln KL = c(model) + s ln g + q g", True, False, _BY_GAUSSIAN),
    Form("bits", "stored bits per weight", "ln KL = c(model) + a(data type) - kappa b", True, False, _bits_encoder),
    Form(
        "kumar",
        "Kumar et al. (2024)",
        "ln KL = ln C + g_D ln D - g_N ln N - k / gamma",
        False,
        False,
        _kumar_encoder,
    ),
)
