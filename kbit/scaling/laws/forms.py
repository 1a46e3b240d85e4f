"""Forms of the law for what quantizing costs: ln KL as a sum of a model's part and a format's part.

KL is the mean divergence from the model as it is. It is fitted instead of the difference of losses because it is the
same quantity without the noise: for a model that predicts its text as well as it claims, the expected difference IS the
divergence, but the text adds its luck to the difference, and from five bits on the luck is the larger part
(fitting.loss_per_kl relates the two). The forms:

- "sensitivity": ln KL = c + ln(v y / e) + q y. v is the divergence that the errors of the weights make to second order,
  from gradients of the model as it is (kbit.evaluate.fisher), so nothing is left for a model's own constant: c is 0
  within 0.05 in all six models tried. y is the noise's share of what the rounded weights hold (gaussian.noise_share),
  e their relative squared error; q says how the divergence grows faster when y is large.
- "error":    ln KL = c(model) + s ln y + q y. To first order the divergence is proportional to the error, so s = 1 is
  expected (the linearity theorem of Malinovskii et al., "HIGGS", 2024). A format enters through its error alone, as in
  Panferov et al. (2025). y and not e, because a good part of a coarse format's error is a matrix at another scale: the
  law of 3 bits and more, held against the 2-bit formats with symmetric codebooks (novels family), misses the loss by
  1.2 % in the median with y and by 2.9 % with e.
- "gaussian": the same with the share on normal weights, which needs no model (laws.gaussian).
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

from kbit.formats.quant_format import QuantFormat
from kbit.formats.registry import parse_format
from kbit.formats.trellis import TrellisFormat
from kbit.host.errors import UsageError
from kbit.scaling.laws.gaussian import ROW, Rounding, gaussian_rounding, noise_share
from kbit.scaling.points import ORIGINAL, Point
from kbit.scaling.sweep.grid import dtype_label

# The largest relative error of the weights that laws are fitted to: 3-bit formats stay below it. On the novels family
# the law of the error misses the divergence by 3 % (root mean square) up to here, and that of the 2-bit formats with
# symmetric codebooks, at 0.12 to 0.67, by 9 % in the median.
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
        noise: the noise's share of the rounded weights (gaussian.noise_share), or None if they were not quantized.
        gaussian: the error on normal weights, or None where the format is not one of kbit's own.
        gaussian_noise: `noise` on normal weights.
        expected_kl: of the errors of the weights to second order (kbit.evaluate.fisher), or None if that is not known.
    """

    format: str
    method: str
    dtype: str
    bits: int
    bits_per_weight: float
    error: float | None
    noise: float | None
    gaussian: float | None
    gaussian_noise: float | None
    expected_kl: float | None = None

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
    rounding = _rounding(point.format)
    error = point.weight_error if point.weight_error > 0 else None
    noise = None
    if error is not None and point.weight_gain is not None:
        noise = noise_share(error, point.weight_gain) or None
    return Target(
        point.format,
        point.method,
        point.dtype,
        point.bits,
        point.bits_per_weight,
        error,
        noise or _noise(error, rounding),
        rounding.error if rounding else None,
        rounding.noise if rounding else None,
        point.expected_kl if point.expected_kl else None,
    )


def target(format: str, method: str, weight_error: float | None = None, expected_kl: float | None = None) -> Target:
    """A format that was not measured.

    Raises:
        UsageError: not a format string.
    """
    parsed = parse_format(format)
    if not isinstance(parsed, QuantFormat | TrellisFormat):
        raise UsageError(f"{format}: no law has an answer for a file of several widths: measure it, by kbit scale")
    if isinstance(parsed, TrellisFormat) and parsed.half:
        raise UsageError(f"{format}: laws are of whole widths: ask for {parsed.with_bits(parsed.bits + 1)}")
    name, dtype = str(parsed), dtype_label(parsed)
    rounding = _rounding(name)
    return Target(
        name,
        method,
        dtype,
        parsed.bits,
        rounding.bits_per_weight if rounding else parsed.bits_per_weight(ROW, ROW),
        weight_error,
        _noise(weight_error, rounding),
        rounding.error if rounding else None,
        rounding.noise if rounding else None,
        expected_kl,
    )


def _rounding(format: str) -> Rounding | None:
    if format == ORIGINAL:
        return None
    try:
        return gaussian_rounding(format)
    except UsageError:  # a method's own format
        return None


def _noise(error: float | None, rounding: Rounding | None) -> float | None:
    """The noise's share where only the error is known: in the proportion of normal weights; else all of it is noise."""
    if error is None:
        return None
    return error * rounding.noise / rounding.error if rounding else noise_share(error, 1.0)


# A format's part of ln KL: a fixed term, and features whose coefficients are fitted; None where the form has no answer.
Encoded = tuple[float, tuple[float, ...]]
Encode = Callable[[Target], "Encoded | None"]


@dataclass(frozen=True)
class Form:
    """A form of the law.

    Attributes:
        name, title, formula: for people.
        encoder: (formats in the fit) -> (names of the coefficients, encode).
        own_constant: whether every measured model has a constant of its own.
        universal: whether that of a model that was not measured is the others' mean, whatever its size.
        residuals: whether a format's mean residual over the models is added.
    """

    name: str
    title: str
    formula: str
    encoder: Callable[[Sequence[Target]], tuple[tuple[str, ...], Encode]]
    own_constant: bool = True
    universal: bool = False
    residuals: bool = False


def _from_noise(read: Callable[[Target], float | None]) -> Callable[[Sequence[Target]], tuple[tuple[str, ...], Encode]]:
    def encoder(targets: Sequence[Target]) -> tuple[tuple[str, ...], Encode]:
        widths = len({target.bits for target in targets})
        curved = _spans(targets, read)

        def encode(target: Target) -> Encoded | None:
            noise = read(target)
            if not noise:
                return None
            if widths < 2:  # errors of one width lie too close together to show an exponent: it is the theory's, 1
                return math.log(noise), ()
            return 0.0, (math.log(noise), noise) if curved else (math.log(noise),)

        return (() if widths < 2 else ("s", "q") if curved else ("s",)), encode

    return encoder


def _spans(targets: Sequence[Target], read: Callable[[Target], float | None]) -> bool:
    """Whether the noise shares reach far enough to show a curvature."""
    shares = [share for share in map(read, targets) if share]
    widths = len({target.bits for target in targets})
    return bool(shares) and widths > 2 and max(shares) > _SPAN_FOR_CURVATURE * min(shares)


def _sensitivity_encoder(targets: Sequence[Target]) -> tuple[tuple[str, ...], Encode]:
    # The power is the theory's, 1 (fitted: 1.000 on the novels family), so that 3 bits can be told from 4 to 8.
    curved = _spans([target for target in targets if target.expected_kl], lambda target: target.noise)

    def encode(target: Target) -> Encoded | None:
        if not (target.expected_kl and target.error and target.noise):
            return None
        return math.log(target.expected_kl * target.noise / target.error), (target.noise,) if curved else ()

    return (("q",) if curved else ()), encode


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


_BY_ERROR = _from_noise(lambda target: target.noise)

_BY_GAUSSIAN = _from_noise(lambda target: target.gaussian_noise)

SENSITIVITY = Form(
    name="sensitivity",
    title="errors of the weights by what the model's gradients say they cost",
    formula="ln KL = c + ln(v y / e) + q y",
    universal=True,
    encoder=_sensitivity_encoder,
)

FORMS = (
    SENSITIVITY,
    Form(
        name="format",
        title="error of the weights, and each format's own factor",
        formula="ln KL = c(model) + s ln y + q y + u(format)",
        residuals=True,
        encoder=_BY_ERROR,
    ),
    Form(
        name="error",
        title="error of the weights",
        formula="ln KL = c(model) + s ln y + q y",
        encoder=_BY_ERROR,
    ),
    Form(
        name="gaussian",
        title="error on normal weights",
        formula="ln KL = c(model) + s ln g + q g",
        encoder=_BY_GAUSSIAN,
    ),
    Form(
        name="bits",
        title="stored bits per weight",
        formula="ln KL = c(model) + a(data type) - kappa b",
        encoder=_bits_encoder,
    ),
    Form(
        name="kumar",
        title="Kumar et al. (2024)",
        formula="ln KL = ln C + g_D ln D - g_N ln N - k / gamma",
        own_constant=False,
        encoder=_kumar_encoder,
    ),
)
