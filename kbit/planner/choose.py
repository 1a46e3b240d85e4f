"""Which model at how many bits, with what cache, for a memory and a speed: `kbit plan`.

Every model is tried in every format and cache width. What does not fit falls out first (planner.memory), then what
is too slow (planner.speed); what is left is ordered by loss (planner.quality). Where losses were not measured
and no law reaches, candidates are ordered by a rule and said to be: the largest model that fits at four bits or more
(Dettmers and Zettlemoyer, "The case for 4-bit precision", 2023, for formats that round to nearest).

What fewer bits in the cache cost is in no table of points: the widest cache that fits and is fast enough is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kbit.formats.quant_format import QuantFormat, default_dtype
from kbit.formats.registry import parse_format
from kbit.formats.trellis import TrellisFormat
from kbit.host.errors import KbitError, UnsupportedError, UsageError
from kbit.planner.memory import predict_memory, ready_weights
from kbit.planner.models import PlanModel
from kbit.planner.quality import Quality, compare, judge
from kbit.planner.types import Candidate, Recommendation, Requirements
from kbit.planner.weights import known_format
from kbit.quantizers.methods import METHODS
from kbit.scaling.points import ORIGINAL, Point

if TYPE_CHECKING:
    from kbit.planner.machine import MachineSpeed
    from kbit.planner.speed import SpeedEstimate
    from kbit.scaling.laws.fit import Laws

# The rule for candidates without a loss prefers widths from this on.
RULE_BITS = 4
# What a GPU reaches of its memory's bandwidth when it decodes: an assumption, no kernel of kbit has been timed there.
_GPU_SHARES = (0.4, 0.85)
# A cache below this many bits costs so much that a format which leaves room for more comes first: 8 bits cost next to
# nothing, 4 bits as much as weights of 5 to 6 (docs/measurements.md).
_NARROW_KV = 8

Rates = Callable[[Iterable[str], Iterable[tuple[str, int, int]]], "MachineSpeed"]


def make_recommendation(
    request: Requirements,
    models: Sequence[PlanModel],
    *,
    points: Sequence[Point] = (),
    laws: Laws | None = None,
    rates: Rates | None = None,
    constant: int | None = None,
    notes: Sequence[str] = (),
) -> Recommendation:
    """Choose.

    Args:
        request: what is wanted.
        models: what to choose from.
        points: measured rows, for the formats that were tried.
        laws: fitted to them; None: nothing is known about losses.
        rates: gives this machine's rates for some kernels and attention shapes; None: speeds are not predicted.
        constant: bytes of a process without a model.
        notes: what to say besides.

    Raises:
        UsageError: a minimum speed without rates to tell.
        KbitError: there are no models.
    """
    if not models:
        raise KbitError("there is no model to choose from: name a folder, a .gguf file or a config.json")
    if request.min_speed is not None and rates is None and request.gpu is None:
        raise UsageError(f"--min-speed {request.min_speed:g} needs the speed of this machine: drop --no-speed")
    rejected: list[tuple[str, str]] = []
    fitting: list[list[Candidate]] = []
    for model in models:
        fits, why = _fitting(request, model, points, constant or 0)
        if laws is not None:
            fits = [_all(options, quality=_judge(laws, options[0])) for options in fits]
        fits = _best_of_widths(fits)
        fitting += fits
        if not fits:
            rejected.append((model.name, why))
    machine = None
    if rates is not None and request.gpu is None and fitting:
        machine = _rates_for(rates, fitting)
    chosen: list[Candidate] = []
    slow: dict[str, float] = {}
    for options in fitting:
        for option in options:
            timed = _timed(request, option, machine, rates)
            if _quick(request, timed):
                chosen.append(timed)
                break
            if timed.speed is not None:
                slow[option.model.name] = max(slow.get(option.model.name, 0.0), timed.speed.decode)
    remaining = {candidate.model.name for candidate in chosen}
    for name, fastest in slow.items():
        if name not in remaining:
            rejected.append((name, f"too slow: {fastest:.3g} tokens/s at best at {request.context} tokens"))
    chosen = _placed(chosen, laws.level if laws is not None else 0.95)
    return Recommendation(
        request,
        tuple(_ordered(chosen)),
        tuple(rejected),
        constant,
        machine,
        (*notes, *_ladders(models, chosen, dict(rejected)), *_notes(request, chosen, machine, laws)),
    )


def _placed(chosen: Sequence[Candidate], level: float) -> list[Candidate]:
    """Candidates with their standing. Narrow caches take no part: their loss leaves out what the cache costs."""
    everybody = compare([candidate.known_quality for candidate in chosen], level)
    wide = compare([None if _narrow(candidate) else candidate.known_quality for candidate in chosen], level)
    if not any(place.compares for place in wide):
        wide = everybody
    return [
        replace(candidate, standing=replace(place, compares=whole.compares))
        for candidate, place, whole in zip(chosen, wide, everybody, strict=True)
    ]


def _fitting(
    request: Requirements, model: PlanModel, points: Sequence[Point], constant: int
) -> tuple[list[list[Candidate]], str]:
    """For each format of a model, its candidates that fit, widest cache first; and why there are none."""
    context = model.tokens(request.context)
    if context > model.spec.context_length:
        return [], f"its context is {model.spec.context_length} tokens"
    found = []
    least: int | None = None
    why = "no cache kind of these suits its heads"
    for method, format in _formats(request, model, points):
        weights = model.in_format(format, request.embedding_bits)
        ready = ready_weights(weights, request.backend)
        options = []
        # (What encoders keep for the time of a pass is not rounded: `kbit.cli.encoders`.)
        for kv in request.kv if not model.encodes else ("fp32" if request.backend == "native" else "fp16",):
            try:
                memory = predict_memory(
                    model.spec,
                    weights,
                    context=context,
                    kv=kv,
                    compute=request.compute,
                    threads=request.threads,
                    backend=request.backend,
                    gguf=model.gguf and format is None,
                    ready=ready,
                )
            except UnsupportedError:
                continue
            least = memory.peak if least is None else min(least, memory.peak)
            if memory.peak + constant <= request.memory:
                options.append(Candidate(model, format, method, kv, weights, memory))
        if options:
            found.append(options)
    if not found and least is not None:
        why = f"needs {_size(least + constant)} at least"
    return found, why


def _formats(
    request: Requirements, model: PlanModel, points: Sequence[Point]
) -> list[tuple[str, QuantFormat | TrellisFormat | None]]:
    """(method, format) to try: the model as it is, what was measured of it, and a default format for each width."""
    tried: dict[tuple[str, QuantFormat | TrellisFormat | None], None] = {}
    if request.formats is None:
        tried[ORIGINAL, None] = None
    if not model.fixed:
        if request.formats is not None:
            tried.update(dict.fromkeys((_usual_method(format), format) for format in request.formats))
        else:
            for point in points:
                if point.model == model.measured and point.bits in request.bits and _runs(point):
                    # Not a row that another version wrote, which has no law either, or of a nested file's width.
                    with suppress(UsageError, UnsupportedError):
                        tried[point.method, known_format(parse_format(point.format))] = None
            tried.update(dict.fromkeys(("rtn", QuantFormat(default_dtype(bits), bits)) for bits in request.bits))
    return list(tried)


def _usual_method(format: QuantFormat | TrellisFormat) -> str:
    """How a format is made where nobody says: `kbit quantize --method`."""
    return "trellis" if isinstance(format, TrellisFormat) else "rtn"


def _runs(point: Point) -> bool:
    """Whether kbit quantize makes what the point measured."""
    return not point.is_original and point.method in METHODS and not METHODS[point.method].measured_only


def _judge(laws: Laws, candidate: Candidate) -> Quality | str:
    model = candidate.model
    if model.encodes:
        return "it is an encoder: kbit eval --tasks stsb"
    method, format = ("rtn", candidate.label) if candidate.format is None else (candidate.method, str(candidate.format))
    if candidate.format is None and model.fixed:
        if model.made is None or model.measured is None:
            return "it is k-bit already, and its loss was not measured: kbit eval"
        method, format = model.made
    return judge(
        laws,
        format,
        method,
        measured=model.measured,
        tokenizer=model.tokenizer,
        linear_parameters=model.linear_parameters,
        training_tokens=model.training_tokens,
    )


def _all(options: Sequence[Candidate], **changes: Any) -> list[Candidate]:
    return [replace(option, **changes) for option in options]


def _best_of_widths(fits: list[list[Candidate]]) -> list[list[Candidate]]:
    """One format per width and kernel: of those that were measured the best, of the others the first.

    Formats that round alike cost nearly the same; what differs in speed (kernel_timing.kernel_key) is kept apart.
    """
    from kbit.planner.kernel_timing import kernel_key

    best: dict[tuple[int, str], list[Candidate]] = {}
    for options in fits:
        head = options[0]
        bits = 16 if head.format is None else head.format.bits
        kind = "" if head.format is None else kernel_key(head.format).split("-")[0]
        known = best.get((bits, kind))
        if known is None or _worth(head) < _worth(known[0]):
            best[bits, kind] = options
    kept = list(best.values())
    unjudged = all(options[0].known_quality is None for options in kept)
    if unjudged:  # nothing tells two formats of a width apart: the default
        first: dict[tuple[int, str], list[Candidate]] = {}
        for options in kept:
            format = options[0].format
            bits, codec = (16, "") if format is None else (format.bits, format.family)
            default = isinstance(format, QuantFormat) and format.dtype == default_dtype(bits)
            if (bits, codec) not in first or default:
                first[bits, codec] = options
        kept = list(first.values())
    return kept


def _worth(candidate: Candidate) -> tuple[int, float]:
    quality = candidate.known_quality
    if quality is None:
        return (2, 0.0)
    return (0 if quality.basis == "measured" else 1, quality.per_byte)


def _rates_for(rates: Rates, fitting: Sequence[Sequence[Candidate]]) -> MachineSpeed:
    """This machine's rates for the widest cache of every candidate."""
    from kbit.planner.speed import needed_attention, needed_kernels

    kernels: dict[str, None] = {}
    shapes: dict[tuple[str, int, int], None] = {}
    for options in fitting:
        spec = options[0].model.spec
        kernels.update(dict.fromkeys(needed_kernels(options[0].weights, spec.tied_embeddings)))
        shapes |= dict.fromkeys(needed_attention(spec, options[0].kv))
    return rates(kernels, shapes)


def _timed(request: Requirements, option: Candidate, machine: MachineSpeed | None, rates: Rates | None) -> Candidate:
    from kbit.planner.speed import needed_attention, needed_kernels, predict_speed

    spec = option.model.spec
    if request.gpu is not None:  # (an encoder's is not bound by the bandwidth, which is all that is known there)
        return option if option.model.encodes else replace(option, speed=_gpu_speed(request, option))
    if machine is None or rates is None:
        return option
    if request.min_speed is not None:  # narrower caches may be needed
        machine = rates(needed_kernels(option.weights, spec.tied_embeddings), needed_attention(spec, option.kv))
    context = option.model.tokens(request.context)
    try:
        return replace(option, speed=predict_speed(spec, option.weights, machine, context=context, kv=option.kv))
    except KbitError:  # a narrower cache that nobody asked the speed of
        return option


def _gpu_speed(request: Requirements, option: Candidate) -> SpeedEstimate:
    """Bytes over bandwidth, times what a GPU might reach of it."""
    from kbit.planner.speed import SpeedEstimate, bytes_per_token

    assert request.gpu is not None
    spec = option.model.spec
    full = bytes_per_token(spec, option.weights, request.context, option.kv, request.backend)
    empty = bytes_per_token(spec, option.weights, 0, option.kv, request.backend)
    low, high = _GPU_SHARES
    middle = (low + high) / 2
    bandwidth = request.gpu.bandwidth
    return SpeedEstimate(
        decode=middle * bandwidth / full,
        low=low * bandwidth / full,
        high=high * bandwidth / full,
        decode_empty=middle * bandwidth / empty,
        prefill=None,
        bytes_per_token=full,
        basis=f"assumed: {low:.0%} to {high:.0%} of the bandwidth; not timed",
    )


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 10**9 else f"{nbytes / 1e6:.0f} MB"


def _quick(request: Requirements, option: Candidate) -> bool:
    return request.min_speed is None or (option.speed is not None and option.speed.decode >= request.min_speed)


def _ordered(chosen: Sequence[Candidate]) -> list[Candidate]:
    """Best first. Of one model, what has a narrow cache comes after what has not: its loss leaves that out."""
    order = sorted(chosen, key=_order)
    by_model: dict[int, list[Candidate]] = {}
    for candidate in order:
        by_model.setdefault(id(candidate.model), []).append(candidate)
    for candidates in by_model.values():
        candidates.sort(key=_narrow)
    return [by_model[id(candidate.model)].pop(0) for candidate in order]


def _narrow(candidate: Candidate) -> bool:
    return candidate.kv.isdigit() and int(candidate.kv) < _NARROW_KV


def _order(candidate: Candidate) -> tuple[Any, ...]:
    """By loss where it compares; else by the rule."""
    quality = candidate.known_quality
    if quality is not None and candidate.standing.compares:
        return (0, quality.per_byte, candidate.memory.peak)
    bits = candidate.rule_bits
    return (1, bits < RULE_BITS, -candidate.model.total_parameters, -bits, candidate.memory.peak)


def _ladders(models: Sequence[PlanModel], chosen: Sequence[Candidate], rejected: Mapping[str, str]) -> list[str]:
    """Of every nested file that fits at some width but not at all: the widest for now, and what the next one needs."""
    notes = []
    names = {candidate.model.name for candidate in chosen}
    for file in dict.fromkeys(model.file for model in models if model.file is not None):
        widths = sorted((model for model in models if model.file == file), key=lambda model: model.bits or 0)
        now = [model for model in widths if model.name in names]
        later = [model for model in widths if now and (model.bits or 0) > (now[-1].bits or 0)]
        if later:
            why = rejected.get(later[0].name, "does not suit")
            notes.append(
                f"{file}: {now[-1].bits:g} bits now; the same file at {later[0].bits:g} bits {why} "
                f"(kbit run --model {file} --bits {later[0].bits:g}, or /bits {later[0].bits:g} in kbit chat)"
            )
    return notes


def _notes(
    request: Requirements, chosen: Sequence[Candidate], machine: MachineSpeed | None, laws: Laws | None
) -> list[str]:
    notes = []
    narrow = sorted({candidate.kv for candidate in chosen if candidate.kv.isdigit()}, key=int, reverse=True)
    if narrow:
        widths = " and ".join(narrow)
        notes.append(
            f"a cache of {widths} bits loses something too, which is not in the losses here: kbit eval MODEL --kv-bits "
            f"{narrow[-1]} --reference MODEL"
        )
    if any(candidate.model.encodes for candidate in chosen):
        notes.append(
            "what bits cost an encoder is not predicted: kbit eval MODEL --tasks stsb --reference MODEL measures it"
        )
    if any(candidate.known_quality is None and not candidate.model.encodes for candidate in chosen):
        what = "no losses were measured" if laws is None or not laws.suites else "some losses are not known"
        notes.append(
            f"{what}: such models are ordered by a rule (the largest that fits at {RULE_BITS} bits or more; Dettmers "
            "and Zettlemoyer 2023); kbit scale MODEL... measures, and --points DIR reads what it wrote"
        )
    if any(quality.extrapolated for quality in (c.known_quality for c in chosen) if quality is not None):
        notes.append("losses marked with * lie beyond what was measured")
    if request.embedding_bits not in (None, 16) and any(c.known_quality is not None for c in chosen):
        notes.append("losses are those of models whose embeddings were kept as they were")
    loading = [candidate for candidate in chosen if candidate.memory.loading > 1.1 * candidate.memory.running]
    if loading and request.gpu is None and request.embedding_bits in (None, 16):
        largest = max(loading, key=lambda candidate: candidate.memory.loading - candidate.memory.running)
        extra = largest.memory.loading - largest.memory.running
        notes.append(
            f"{largest.model.name} {largest.label} needs {_size(extra)} more while it is loaded than when it runs, for "
            "its 16-bit embedding or head: --embedding-bits 8 spares that"
        )
    if request.gpu is not None:
        notes.append(
            f"{request.gpu.name}: {request.gpu.bandwidth / 1e9:.0f} GB/s; speeds are assumptions, since no kernel of "
            "kbit has been timed there, and what the driver takes (some hundred MB) is not counted"
        )
    if machine is not None and machine.disturbed:
        notes.append(
            f"other processes kept {machine.busy:.1f} processors busy while this machine was timed: --remeasure when "
            "it is quiet"
        )
    return notes
