"""From a budget to a format for every matrix: calibrate, weigh the widths, solve the knapsack."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from kbit.calibration.run import calibrate
from kbit.checkpoint.source import CheckpointSource
from kbit.formats.codec import Codec
from kbit.formats.quant_format import QuantFormat
from kbit.formats.trellis import TrellisFormat
from kbit.host.errors import UnsupportedError, UsageError
from kbit.host.progress import Progress
from kbit.host.quantities import size
from kbit.quantizers.allocate import (
    LINEAR_WIDTHS,
    OUTSIDE_WIDTHS,
    TRELLIS_WIDTHS,
    Allocation,
    Choice,
    allocate,
    known_choices,
    measure_choices,
)
from kbit.quantizers.calibrated import CalibratedRounding
from kbit.quantizers.plan import Plan, TensorPlan
from kbit.quantizers.stored import STORED, format_as_stored


@dataclass(frozen=True)
class Budget:
    """How much a model may take: one of three.

    Attributes:
        bits: mean bits of a code in linear layers; what these leave over can go to embeddings and head, and the other
            way round.
        nbytes: of everything that is stored.
        cost: KL divergence in nats per token that is to be reached.
    """

    bits: float | None = None
    nbytes: int | None = None
    cost: float | None = None


def mixed_formats(
    source: CheckpointSource,
    plan: Plan,
    method: CalibratedRounding,
    budget: Budget,
    fixed: Collection[str],
    *,
    progress: Progress | None = None,
) -> Allocation:
    """Formats for the matrices of a plan.

    Args:
        source: the model.
        plan: of one width, which says what is quantized at all, and in what blocks and scales.
        method: who will round.
        budget: for all of them.
        fixed: names of matrices whose formats stay as planned.
        progress: told of the work: what, steps done, steps in all.

    Raises:
        UsageError: the budget cannot be met.
        UnsupportedError: formats whose widths cannot be mixed.
        KbitError and its kinds: see kbit.calibration.run.calibrate.
    """
    formats = _formats_to_try(plan, fixed)
    _check_size(plan, budget, formats)  # before hours of work
    calibration = calibrate(source, method.request, progress=progress)
    choices = measure_choices(source, formats, calibration, method.request, method.rounding, progress=progress)
    return _solve(plan, budget, choices)


def known_formats(
    source: CheckpointSource, plan: Plan, method: CalibratedRounding, budget: Budget, fixed: Collection[str]
) -> Allocation | None:
    """`mixed_formats` of what the cache holds; None where something is still to be measured.

    Raises:
        As mixed_formats.
    """
    if not method.is_calibrated(source):
        return None
    formats = _formats_to_try(plan, fixed)
    _check_size(plan, budget, formats)
    calibration = calibrate(source, method.request)  # measures nothing: all is there
    choices = known_choices(source, formats, calibration, method.rounding)
    return None if choices is None else _solve(plan, budget, choices)


def predicted_costs(
    source: CheckpointSource,
    plan: Plan,
    method: CalibratedRounding,
    known: Mapping[str, Choice],
    *,
    progress: Progress | None = None,
) -> dict[str, float]:
    """What every quantized matrix of a plan costs, by name, in nats per token.

    Args:
        source: the model.
        plan: of it.
        method: who will round; calibrated with gradients.
        known: choices that were weighed already; others are weighed now.
        progress: told of the work: what, steps done, steps in all.
    """
    costs: dict[str, float] = {}
    formats: dict[str, tuple[Codec]] = {}
    for tensor in plan.tensors:
        name = tensor.source.name
        if tensor.as_stored:
            costs[name] = 0.0
        elif name in known and known[name].format == tensor.format:
            costs[name] = known[name].cost
        elif isinstance(tensor.format, QuantFormat | TrellisFormat) and tensor.role != "table":
            formats[name] = (tensor.format,)
    if formats:
        calibration = calibrate(source, method.request, progress=progress)
        found = measure_choices(source, formats, calibration, method.request, method.rounding, progress=progress)
        costs |= {name: choice.cost for name, (choice,) in found.items()}
    return costs


def _formats_to_try(plan: Plan, fixed: Collection[str]) -> dict[str, tuple[Codec, ...]]:
    """Of the matrices that are not fixed, by name. What rounding a table costs is not known: it stays as planned."""
    return {
        tensor.source.name: _worth_trying(tensor, _candidates(tensor.format, tensor.role))
        for tensor in plan.tensors
        if tensor.format and not tensor.as_stored and tensor.source.name not in fixed and tensor.role != "table"
    }


def _check_size(plan: Plan, budget: Budget, formats: Mapping[str, Sequence[Codec]]) -> None:
    """Raise where the narrowest of the formats to try exceed a budget of bytes."""
    if budget.nbytes is None:
        return
    least = 0
    for tensor in plan.tensors:
        tried = formats.get(tensor.source.name)
        narrowest = [format.nbytes(*tensor.source.shape) for format in tried or ()]
        narrowest += [choice.nbytes for choice in _as_stored(tensor)] if tried else []
        least += min(narrowest) if narrowest else tensor.nbytes
    if least > budget.nbytes:
        unit, name = (1e6, "MB") if least >= 1e6 else (1e3, "KB")
        raise UsageError(
            f"{size(budget.nbytes)} are too few: at its narrowest widths the model takes {size(least)}; use --size "
            f"{math.ceil(least / unit * 100) / 100:.2f}{name} or more, or a smaller model"
        )


def _solve(plan: Plan, budget: Budget, choices: Mapping[str, Sequence[Choice]]) -> Allocation:
    free = {tensor.source.name: tensor for tensor in plan.tensors if tensor.source.name in choices}
    choices = {name: (*tried, *_as_stored(free[name])) for name, tried in choices.items()}
    nbytes = None
    if budget.nbytes is not None:
        nbytes = budget.nbytes - sum(t.nbytes for t in plan.tensors if t.source.name not in free)
    elif budget.bits is not None:
        nbytes = 0
        for tensor in free.values():
            assert tensor.format is not None
            bits = tensor.format.bits if tensor.role != "linear" else budget.bits
            nbytes += round(_bytes_at(tensor.format, tensor.source.shape, bits))
    found = allocate(choices, nbytes, budget.cost)
    weights = sum(tensor.source.numel for tensor in free.values())
    return replace(found, half_bit_more=allocate(choices, found.nbytes + weights // 16).cost)


def _worth_trying(tensor: TensorPlan, candidates: tuple[Codec, ...]) -> tuple[Codec, ...]:
    """Of several formats those that take less than the matrix as it is stored, which costs nothing; at least one."""
    limit = min((choice.nbytes for choice in _as_stored(tensor)), default=None)
    if limit is None:
        return candidates
    return tuple(f for f in candidates if f.nbytes(*tensor.source.shape) < limit) or candidates[:1]


def _as_stored(tensor: TensorPlan) -> tuple[Choice, ...]:
    """Of a matrix that the source holds quantized: that, which costs nothing."""
    format = format_as_stored(tensor.source)
    return () if format is None else (Choice(STORED, format.nbytes(*tensor.source.shape), 0.0),)


def _candidates(format: object, role: str) -> tuple[Codec, ...]:
    """Formats to try: the default data type of every width in the planned blocks; at 3 and 4 bits, two. Or
    trellises, of half widths too."""
    if isinstance(format, TrellisFormat):
        return tuple(format.with_bits(bits) for bits in TRELLIS_WIDTHS)
    if not isinstance(format, QuantFormat):
        raise UnsupportedError(f"{format}: widths can be mixed for formats of planes and trellis only")
    found: dict[Codec, None] = {}
    for width in LINEAR_WIDTHS if role == "linear" else OUTSIDE_WIDTHS:
        for dtype in ("lloyd", "nf") if width in (3, 4) else ("int",) if width == 8 else ("lloyd",):
            found[QuantFormat(
                dtype, width, format.block_size, scale_dtype=format.scale_dtype, double_quant=format.double_quant,
                outliers=format.outliers,
            )] = None  # fmt: skip
    return tuple(found)


def _bytes_at(format: object, shape: tuple[int, ...], bits: float) -> float:
    """Bytes of a matrix at a width that may lie between two."""
    assert isinstance(format, QuantFormat | TrellisFormat)
    low, outliers = int(bits), format.outliers

    def nbytes(width: int) -> int:
        at_width = format.with_bits(width) if isinstance(format, TrellisFormat) else format.at_width(width)
        return at_width.keeping(outliers).nbytes(shape[0], shape[1])

    below = nbytes(low)
    above = below if low == bits else nbytes(low + 1)
    return below + (bits - low) * (above - below)
