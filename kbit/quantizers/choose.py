"""Which method `kbit quantize` uses: a plan file's, or what there is memory and time for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from kbit.formats.trellis import TrellisFormat
from kbit.host.errors import UsageError
from kbit.host.notes import note
from kbit.host.quantities import duration, size
from kbit.quantizers.nested_flags import FORMAT_FLAGS
from kbit.quantizers.request import MEASURED_TOKENS, QuantizeRequest

if TYPE_CHECKING:
    from kbit.checkpoint.source import CheckpointSource
    from kbit.formats.codec import Codec
    from kbit.quantizers.calibrated import CalibratedRounding
    from kbit.quantizers.estimate import Rates
    from kbit.quantizers.method import Method
    from kbit.quantizers.plan_file import PlanFile

R = TypeVar("R", bound=QuantizeRequest)

# Seconds that a user is told of unasked.
_WORTH_SAYING = 60.0
# Fewer tokens than these are not suggested: the factors of a small sample fit nothing else.
_FEWEST_TOKENS = 2048
# Rounding a weight to nearest, and finding offsets half-quadratically, in exponentials (see kbit.quantizers.estimate).
_NEAREST, _HALF_QUADRATIC = 15.0, 300.0


class Choice(NamedTuple):
    """What `within_time` chose.

    Attributes:
        method: how matrices are rounded.
        mixed: whether widths are mixed.
        note: how long it is estimated to take, for the user; "" where that is not asked for and no wait either.
    """

    method: Method
    mixed: bool
    note: str = ""


def following(flags: R, asked: PlanFile) -> R:
    """The flags with a plan file's method and calibration, where the flags name none themselves.

    Raises:
        UsageError: a flag that says what the plan file says already.
    """
    says = {
        "--bits": flags.bits,
        "--size": flags.size,
        "--max-kl": flags.max_kl,
        "--uniform": flags.uniform,
        **{FORMAT_FLAGS[name]: value for name, value in flags.format_fields.items() if name != "bits"},
        "--format": flags.format,
        "--nested": flags.nested,
        "--embedding-bits": flags.embedding_bits,
        "--override": flags.override,
    }
    flag = next((flag for flag, value in says.items() if value), None)
    if flag is not None:
        raise UsageError(f"{flag}: {asked.path} says every format; edit it, or drop one of the two")
    calibrates = flags.method == "auto" and asked.texts is not None
    return replace(
        flags,
        method=asked.method if flags.method == "auto" else flags.method,
        calibration=flags.calibration or (list(asked.texts or ()) if calibrates else None),
        calibration_tokens=flags.calibration_tokens or (asked.tokens if calibrates else None),
        inputs_only=flags.inputs_only or (calibrates and not asked.gradients),
        act_order=flags.act_order or (calibrates and asked.act_order),
        static_scales=flags.static_scales or (calibrates and asked.static_scales),
        uniform=asked.uniform,
        anchor=flags.anchor or asked.anchor,
    )


def for_encoder(source: CheckpointSource, flags: R) -> R:
    """The flags with what stands in for `auto`'s method where a model predicts no next token, of which a note tells."""
    from kbit.models.families import spec_from_config

    spec = spec_from_config(source.config, where=f"config of {source.path}")
    if flags.method != "auto" or spec.continues_text:
        return flags
    if spec.encoder is not None:
        if spec.encoder.sound is not None and not flags.calibration:
            note("a model of sound is not calibrated: method rtn")
            return replace(flags, method="rtn")
        if flags.calibration:
            note("an encoder-decoder is calibrated on inputs only: method gptq")
            return replace(flags, method="gptq", inputs_only=True)
        note(
            "an encoder-decoder has no text of its own to calibrate on: method rtn (--calibration TEXT takes "
            "gptq, on inputs only)"
        )
        return replace(flags, method="rtn")
    if flags.calibration:
        note("an encoder has no gradients to weigh errors by: method gptq, on inputs only")
        return replace(flags, method="gptq", inputs_only=True)
    note("an encoder writes no text to calibrate on: method rtn (--calibration TEXT takes gptq, on inputs only)")
    return replace(flags, method="rtn")


def within_memory(source: CheckpointSource, method: Method, flags: QuantizeRequest) -> Method:
    """The method, or what stands in for `auto`'s where there is no memory for gradients, which the user is told.

    What is calibrated already takes no such memory.

    Raises:
        UsageError: the user asked for what does not fit; the message says what does.
    """
    from kbit.calibration.request import CalibrationRequest
    from kbit.host.memory import available_memory
    from kbit.quantizers.calibrated import CalibratedRounding, Gptq

    if not isinstance(method, CalibratedRounding) or method.is_calibrated(source):
        return method
    needed, available = _memory(source, method), available_memory()
    if available is None or needed <= available:
        return method
    request = CalibrationRequest(method.request.texts, method.request.tokens, gradients=False)
    plainer = Gptq(request).with_options(**flags.options) if flags.method == "auto" else method.calibrated_on(request)
    less = plainer if method.nesting is None else plainer.nested(method.nesting)
    fits = less.is_calibrated(source) or _memory(source, less) <= available
    short = f"calibrating needs about {size(needed)} of memory, and {size(available)} is available"
    if flags.method == "auto" and method.request.gradients and fits and flags.mixes is None:
        note(
            f"with gradients, {short}: measuring inputs only, for method gptq and one width, which needs about "
            f"{size(_memory(source, less))}"
        )
        return less
    remedies = []
    tokens = _tokens_that_fit(source, method, available)
    if tokens is not None:
        remedies.append(f"--calibration-tokens {tokens}")
    if fits and method.request.gradients and flags.mixes is None:
        plainest = "trellis" if isinstance(method.format(4, False), TrellisFormat) else "gptq"
        remedies.append(f"--method {plainest} --inputs-only")
    without = flags.mixes or ("--fast" if flags.fast else None)
    remedies.append("--method rtn" + ("" if without is None else f" (without {without})"))
    raise UsageError(f"method {method.name}: {short}; use {', or '.join(remedies)}")


def within_time(source: CheckpointSource, method: Method, codec: Codec, flags: QuantizeRequest) -> Choice:
    """The most accurate method that is estimated to be done in time, and whether it mixes widths.

    Args:
        source: the model.
        method: the most accurate one that there is memory for.
        codec: of linear weights, where widths are not mixed.
        flags: without a time budget, the method is the one given.

    Raises:
        UsageError: nothing that meets the flags fits.
    """
    from kbit.backends.select import set_threads
    from kbit.quantizers.calibrated import CalibratedRounding
    from kbit.quantizers.tuned import TunedTwoSided

    mixed, budget = flags.mixes_widths(method), flags.seconds
    if budget is None and (flags.dry_run or not isinstance(method, CalibratedRounding)):
        return Choice(method, mixed)
    import torch

    from kbit.quantizers.estimate import measure_rates

    set_threads(flags.threads)
    rates, more = measure_rates(torch.get_num_threads(), trellises=isinstance(codec, TrellisFormat)), ""
    for candidate, mixes in _from_the_best(source, method, codec, flags, mixed):
        seconds = _seconds(source, candidate, codec, flags, mixes, rates)
        said = f"{candidate.name}{', mixed widths' if mixes else ''}"
        if budget is None:
            told = f"method {said}: about {duration(seconds)}" if seconds >= _WORTH_SAYING else ""
            if isinstance(candidate, TunedTwoSided):
                told = f"method {said}: about {duration(seconds)} besides tuning, which is not estimated"
            return Choice(candidate, mixes, told)
        if seconds <= budget:
            told = f"time budget {duration(budget)}: method {said}, about {duration(seconds)}{more}"
            return Choice(candidate, mixes, told)
        more = f"; {said} would take about {duration(seconds)}"
        fastest = f"{said} takes about {duration(seconds)}"
    what = "" if flags.mixes is None else f", and {flags.mixes} needs it (a whole number of --bits does not)"
    raise UsageError(f"--time-budget {flags.time_budget}: {fastest}{what}; allow more time")


def _from_the_best(
    source: CheckpointSource, method: Method, codec: Codec, flags: QuantizeRequest, mixed: bool
) -> Iterator[tuple[Method, bool]]:
    """The methods to choose from, the most accurate first, each with whether it mixes widths."""
    from kbit.quantizers.calibrated import CalibratedRounding, Gptq, ScaleSearch
    from kbit.quantizers.methods import get_method

    yield method, mixed
    if flags.mixes is not None:
        return
    if mixed:
        yield method, False
    if isinstance(method, CalibratedRounding):
        full, less = method.request, replace(method.request, gradients=False)
        optional = any(flags.options.values())
        for cheaper in (Gptq(), *(() if optional else (ScaleSearch(),))):
            if cheaper.refuses(codec) is not None:
                continue
            known = cheaper.with_options(**flags.options).calibrated_on(full)
            known = known if method.nesting is None else known.nested(method.nesting)
            if known.identity != method.identity:
                yield known if known.is_calibrated(source) else known.calibrated_on(less), False
        if optional:
            return  # the others have no use for what was asked for
    for name in ("hqq", "rtn"):
        plain = get_method(name)
        if plain.refuses(codec) is None and plain.name != method.name:
            yield plain, False


def _seconds(
    source: CheckpointSource, method: Method, codec: Codec, flags: QuantizeRequest, mixed: bool, rates: Rates
) -> float:
    from kbit.quantizers.awq import CLIPS, ActivationAware
    from kbit.quantizers.calibrated import CalibratedRounding
    from kbit.quantizers.estimate import Steps, estimate

    trellis = codec if isinstance(codec, TrellisFormat) else None
    if not isinstance(method, CalibratedRounding):
        each = _HALF_QUADRATIC if method.name == "hqq" else _NEAREST
        steps = Steps(searches=False, feedback=False, two_sided=False, each=each, trellis=trellis)
        return estimate(source, steps, rates)
    measured = MEASURED_TOKENS if flags.measures(method) else 0
    if isinstance(method, ActivationAware):
        request, tried = None if method.is_calibrated(source) else method.request, method.grid + len(CLIPS)
        each = _NEAREST * tried
        steps = Steps(request, searches=False, each=each, products=method.grid, measured_tokens=measured)
        return estimate(source, steps, rates)
    calibrated, weigh = method.is_calibrated(source), mixed or method.mixes_nested
    if weigh and calibrated:
        from kbit.quantizers.mixed import known_formats
        from kbit.quantizers.nested_order import is_weighed

        plan = flags.plan(source, codec, method)
        if method.mixes_nested:
            weigh = not is_weighed(source, plan, method)
        else:
            weigh = known_formats(source, plan, method, flags.budget, flags.fixed(plan)) is None
    steps = Steps(
        calibrate=None if calibrated else method.request,
        weigh=weigh,
        judged=method.request if weigh else None,
        feedback=method.rounding.feedback,
        two_sided=method.rounding.two_sided and method.request.gradients,
        sweeps=method.rounding.sweeps,
        trellis=trellis,
        measured_tokens=measured,
    )
    return estimate(source, steps, rates)


def _memory(source: CheckpointSource, method: CalibratedRounding) -> int:
    from kbit.quantizers.plan import BASE_BYTES

    return BASE_BYTES + method.memory(source)


def _tokens_that_fit(source: CheckpointSource, method: CalibratedRounding, available: int) -> int | None:
    """The most tokens, in powers of two, that there is memory for; None: too few to be of use."""
    tokens = 65536
    while tokens >= _FEWEST_TOKENS:
        if _memory(source, method.calibrated_on(replace(method.request, tokens=tokens))) <= available:
            return tokens
        tokens //= 2
    return None
