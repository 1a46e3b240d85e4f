"""Bits where they matter: a width for every matrix, so that a budget of bytes costs the least divergence.

Each matrix is rounded at every candidate width, by the method that will be used, and what its error costs is told by
both factors of its Fisher information: a diagonal estimate is far off for errors that avoid steep directions. They are
factors of other text than the rounding has fitted its errors to. Costs of matrices add up (docs/accuracy.md says how
well), so the best choice is a knapsack, solved on the lower convex hull of each matrix's (bytes, cost): from the
narrowest widths, always the step that saves most per byte.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from kbit.formats.codec import Codec
from kbit.formats.trellis import FAST_WINDOW, TrellisFormat, least_window
from kbit.host.errors import UsageError
from kbit.host.progress import Progress
from kbit.quantizers.kept_costs import by_layer, costs_file, read_costs, write_costs

if TYPE_CHECKING:
    from kbit.calibration.measure import LayerFactors
    from kbit.calibration.request import CalibrationRequest
    from kbit.calibration.store import CalibrationFolder
    from kbit.checkpoint.source import CheckpointSource
    from kbit.quantizers.settings import Settings

# Widths that matrices inside the layers, and embedding and head, can get.
LINEAR_WIDTHS, OUTSIDE_WIDTHS = (2, 3, 4, 5, 6, 8), (4, 5, 6, 8)
# The same of trellises: a matrix between two widths costs less at the half than a share of matrices at each.
TRELLIS_WIDTHS = (2, 2.5, 3, 3.5, 4, 4.5, 5, 5.5, 6, 8)
# Raised whenever the same matrix gets other costs.
_VERSION = 5


@dataclass(frozen=True)
class Choice:
    """A matrix at one width.

    Attributes:
        format: of the matrix; or "stored", quantized as the source has it.
        nbytes: it takes.
        cost: divergence in nats per token that its error makes, to second order.
    """

    format: Codec | str
    nbytes: int
    cost: float


@dataclass(frozen=True)
class Allocation:
    """Formats of matrices.

    Attributes:
        chosen: by name.
        cost: predicted divergence of all together.
        nbytes: of all together.
        half_bit_more: predicted divergence with half a bit more for every weight, if that was asked for.
    """

    chosen: Mapping[str, Choice]
    cost: float
    nbytes: int
    half_bit_more: float | None = None


def measure_choices(
    source: CheckpointSource,
    formats: Mapping[str, Sequence[Codec]],
    calibration: CalibrationFolder,
    request: CalibrationRequest,
    rounding: Settings,
    *,
    progress: Progress | None = None,
) -> dict[str, tuple[Choice, ...]]:
    """What every matrix costs in every format, on text that calibration has not seen.

    Kept beside the calibration, layer by layer.

    Args:
        source: the model.
        formats: to be tried, by the matrix's name.
        calibration: of the model, with gradients.
        request: what calibration was made on.
        rounding: how matrices are rounded.
        progress: called after each layer.
    """
    import torch

    from kbit.calibration.held_out import held_out_factors

    threads = torch.get_num_threads()  # while the judge is at work, torch's own are one
    files = {
        layer: (wanted, *_costs_file(wanted, calibration, rounding, layer))
        for layer, wanted in by_layer(source, formats).items()
    }
    missing = {layer for layer, (_, kept, described) in files.items() if read_costs(kept, described) is None}
    if missing:
        if progress is not None:
            progress("weighing widths", 0, len(missing))
        judges = held_out_factors(source, request, lambda layer: layer not in missing)
        for done, judge in enumerate(judges):
            wanted, kept, _ = files[judge.layer]
            costs = _measure_layer(source, wanted, calibration, rounding, judge, threads)
            write_costs(kept, costs)
            if progress is not None:
                progress("weighing widths", done + 1, len(missing))
    found = known_choices(source, formats, calibration, rounding)
    assert found is not None
    return found


def known_choices(
    source: CheckpointSource,
    formats: Mapping[str, Sequence[Codec]],
    calibration: CalibrationFolder,
    rounding: Settings,
) -> dict[str, tuple[Choice, ...]] | None:
    """`measure_choices` where all of them were measured before, else None."""
    found: dict[str, tuple[Choice, ...]] = {}
    for layer, wanted in by_layer(source, formats).items():
        costs = read_costs(*_costs_file(wanted, calibration, rounding, layer))
        if costs is None:
            return None
        found |= _choices(source, wanted, costs)
    return found


def allocate(choices: Mapping[str, Sequence[Choice]], nbytes: int | None, cost: float | None = None) -> Allocation:
    """The formats that cost least within a budget; or the fewest bytes that cost no more than asked for.

    Args:
        choices: by name.
        nbytes: budget of all together; None: none.
        cost: the predicted divergence to reach; None: use the budget up.

    Raises:
        UsageError: the narrowest formats exceed the budget, or the widest cost more than asked for.
    """
    hulls = {name: _hull(tried) for name, tried in choices.items()}
    place = dict.fromkeys(hulls, 0)
    total = sum(hull[0].nbytes for hull in hulls.values())
    spent = sum(hull[0].cost for hull in hulls.values())
    if nbytes is not None and total > nbytes:
        raise UsageError(
            f"{nbytes / 1e6:.1f} MB are too few: at the narrowest widths the quantized matrices take "
            f"{total / 1e6:.1f} MB"
        )
    steps = [(-_gain(hull, 0), name) for name, hull in hulls.items() if len(hull) > 1]
    heapq.heapify(steps)
    while steps and (cost is None or spent > cost):
        _, name = heapq.heappop(steps)
        hull, at = hulls[name], place[name]
        more = hull[at + 1].nbytes - hull[at].nbytes
        if nbytes is not None and total + more > nbytes:
            continue  # a smaller matrix may still fit
        total += more
        spent += hull[at + 1].cost - hull[at].cost
        place[name] = at + 1
        if at + 2 < len(hull):
            heapq.heappush(steps, (-_gain(hull, at + 1), name))
    if cost is not None and spent > cost:
        raise UsageError(
            f"a divergence of {cost:g} is out of reach: the widest formats are predicted to cost {spent:.2g}"
        )
    chosen = {name: hull[place[name]] for name, hull in hulls.items()}
    return Allocation(chosen, sum(choice.cost for choice in chosen.values()), total)


def _hull(tried: Sequence[Choice]) -> list[Choice]:
    """The choices on the lower convex hull of (bytes, cost), from the fewest bytes on."""
    hull: list[Choice] = []
    for choice in sorted(tried, key=lambda choice: (choice.nbytes, choice.cost)):
        if hull and choice.cost >= hull[-1].cost:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-2], choice):
            hull.pop()
        hull.append(choice)
    return hull


def _slope(a: Choice, b: Choice) -> float:
    """Divergence saved per byte from a to b."""
    return (a.cost - b.cost) / (b.nbytes - a.nbytes)


def _gain(hull: Sequence[Choice], at: int) -> float:
    return _slope(hull[at], hull[at + 1])


def _choices(
    source: CheckpointSource, wanted: Mapping[str, Sequence[Codec]], costs: Mapping[str, Sequence[float]]
) -> dict[str, tuple[Choice, ...]]:
    return {
        name: tuple(
            Choice(format, format.nbytes(*source.tensors[name].shape), cost * _share_of_cheap(format))
            for format, cost in zip(tried, costs[name], strict=True)
        )
        for name, tried in wanted.items()
    }


def _costs_file(
    wanted: Mapping[str, Sequence[Codec]], calibration: CalibrationFolder, rounding: Settings, layer: int | None
) -> tuple[Path, dict[str, list[str]]]:
    """Where the costs of a layer's matrices are kept, and the formats in it by name: those that tell the costs, so that
    what is weighed for --fast is weighed for slower trellises, too."""
    described = {name: [str(_cheap(format)) for format in tried] for name, tried in wanted.items()}
    identity = {"version": _VERSION, "rounding": rounding.identity, "formats": described}
    return costs_file(calibration, layer, identity), described


def _measure_layer(
    source: CheckpointSource,
    wanted: Mapping[str, Sequence[Codec]],
    calibration: CalibrationFolder,
    rounding: Settings,
    judge: LayerFactors,
    threads: int,
) -> dict[str, list[float]]:
    """By name: divergences in each format, or in the cheap one that tells them, by the judge's factors of a layer."""
    import torch

    from kbit.calibration.factors import ROWS_AT_ONCE
    from kbit.calibration.workers import workers
    from kbit.quantizers.rounding import Rounder

    factors = calibration.read(judge.layer)
    weights = {name: source.read(name).float() for name in wanted}  # by this thread: a source has one place in its file

    rounders = {name: Rounder(factors[name], rounding, weight.shape[1]) for name, weight in weights.items()}

    def cost(job: tuple[str, Codec, Settings]) -> float:
        name, format, settings = job
        weight, known, rounder = weights[name], judge.factors[name], rounders[name]
        # Of a vocabulary some rows at a time, where neither factors nor the format join them.
        apart = known.rows_apart and rounder.rows_apart(format)
        step, told = ROWS_AT_ONCE if apart else len(weight), 0.0
        for start in range(0, len(weight), step):
            some = weight[start : start + step]
            error = rounder.round(some, _cheap(format), settings, threads=each, name=name).dequantize()
            torch.sub(some, error, out=error)
            told += known.divergence(error, start, len(weight))
        return told

    # Descent saves about the same share of a matrix's cost in every format (docs/measurements.md), so one tells it.
    rough = replace(rounding, sweeps=0)
    each = max(1, threads // len(wanted))
    samples = {name: min(tried, key=lambda format: abs(format.bits - 4)) for name, tried in wanted.items()}
    with workers(threads) as pool:
        by_size = sorted(wanted, key=lambda name: -source.tensors[name].numel)
        # One format of every matrix first, which takes its factors apart for the others.
        jobs = [(name, format, rough) for name in by_size for format in wanted[name]]
        if rounding.sweeps:
            swept = [name for name in by_size if not isinstance(samples[name], TrellisFormat)]
            jobs = [(name, samples[name], rounding) for name in swept] + jobs
        costs = dict(zip(jobs, pool.map(cost, jobs), strict=True))

    def after_descent(name: str, format: Codec) -> float:
        if isinstance(samples[name], TrellisFormat):
            return costs[name, format, rough]
        before = costs[name, samples[name], rough]
        share = costs[name, samples[name], rounding] / before if before > 0 else 1.0
        return costs[name, format, rough] * share

    return {name: [after_descent(name, format) for format in tried] for name, tried in wanted.items()}


def _share_of_cheap(format: Codec) -> float:
    """What a format costs in shares of what tells its costs: of normal numbers, which rotated weights nearly are.

    Short windows lose more at wide widths (a twentieth at 2 bits, a third at 6), which would have too few matrices.
    """
    from kbit.formats.trellis_code import normal_error

    cheap = _cheap(format)
    if cheap == format or not (isinstance(format, TrellisFormat) and isinstance(cheap, TrellisFormat)):
        return 1.0
    return normal_error(format.keeping(0)) / normal_error(cheap.keeping(0))


def _cheap(format: Codec) -> Codec:
    """What tells a format's costs: trellises of short windows take a fifteenth of the time."""
    if not isinstance(format, TrellisFormat) or format.code == "int":
        return format
    return replace(format, window=min(format.window, max(FAST_WINDOW, least_window(format.width))))
