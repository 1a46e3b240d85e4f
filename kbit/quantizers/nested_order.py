"""Mixed widths in a nested file: the order in which planes are added, and what that asks of rounding.

From all matrices at the narrowest width, the next step is always the one that saves most predicted divergence per byte,
as widths are chosen for a budget (kbit.quantizers.allocate); but what lies below a whole number of bits is filled up
before a step goes beyond it. So every rung is part of the next one, and each whole number takes the bytes of one width
for all. Costs are those of nested rounding, told by factors of text that calibration has not seen.

A matrix is then read at a width by some rungs only, where its error is some share of the rung's. That is what its
widths count when it is rounded: the sum over rungs of those shares, some rungs counting more than others.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from kbit.checkpoint.ladder import Ladder, Order
from kbit.formats.nested import NestedFormat
from kbit.host.progress import Progress
from kbit.quantizers.kept_costs import by_layer, costs_file, read_costs, write_costs
from kbit.quantizers.settings import SWEEPS, Nesting

if TYPE_CHECKING:
    from pathlib import Path

    from kbit.calibration.factors import Factors
    from kbit.calibration.store import CalibrationFolder
    from kbit.checkpoint.source import CheckpointSource
    from kbit.quantizers.calibrated import CalibratedRounding
    from kbit.quantizers.method import Method
    from kbit.quantizers.plan import Plan

# Raised whenever the same matrix gets other costs.
_VERSION = 1
# Rungs at which shares are counted: whole numbers of bits and what lies between them.
_STEP = 0.25
# What a width counts at least, in shares of the one that counts most: no rung reads it, or hardly.
_FLOOR = 0.003


@dataclass(frozen=True)
class NestedOrder:
    """Mixed widths of a nested file.

    Attributes:
        order: in which planes are added.
        emphasis: of each matrix, what its widths count, the narrowest first.
    """

    order: Order
    emphasis: Mapping[str, tuple[float, ...]]


def why_uniform(plan: Plan, method: Method) -> str | None:
    """Why all nested matrices of a plan will be read at one width, although they need not; None: their widths can be
    mixed, or nobody asked for it."""
    from kbit.quantizers.calibrated import CalibratedRounding

    if not isinstance(method, CalibratedRounding) or method.nesting is None:
        return None
    if not method.request.gradients:
        return "what errors cost is told by gradients, which are not measured"
    nested = [tensor for tensor in plan.tensors if isinstance(tensor.format, NestedFormat)]
    if len({tensor.format.widths for tensor in nested if tensor.format is not None}) > 1:
        return "matrices have different widths: drop --override"
    table = next((tensor.source.name for tensor in nested if tensor.role == "table"), None)
    return None if table is None else f"what errors of {table} cost is not known"


def ordered(
    source: CheckpointSource, plan: Plan, method: CalibratedRounding, *, progress: Progress | None = None
) -> Plan:
    """A plan with mixed widths of its nested matrices.

    Args:
        source: the model.
        plan: of it.
        method: who will round, with mixed widths (`CalibratedRounding.mixes_nested`).
        progress: told of the work: what, steps done, steps in all.

    Returns:
        The same plan where `why_uniform` says why.

    Raises:
        KbitError and its kinds: see kbit.calibration.run.calibrate.
    """
    assert method.nesting is not None
    if why_uniform(plan, method) is not None:
        return plan
    formats = _nested_of(plan)
    sizes = {t.source.name: t.source.numel for t in plan.tensors if t.source.name in formats}
    costs = _measured(source, formats, method, progress)
    order = best_order(costs, sizes)
    emphasis = emphasis_by_matrix(order, costs, sizes, method.nesting)
    found = NestedOrder(order, emphasis)
    identity = {"plan": plan.plan_id, "order": order.to_json(), "emphasis": emphasis}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return replace(plan, nested=found, plan_id=digest)


def best_order(costs: Mapping[str, Mapping[int, float]], sizes: Mapping[str, int]) -> Order:
    """The order in which planes save most divergence per byte.

    Args:
        costs: of each matrix, what each width costs; all have the same widths.
        sizes: weights of each matrix.
    """
    names = tuple(costs)
    widths = sorted(next(iter(costs.values())))
    reached = [widths[0]] * len(names)
    total = sum(sizes.values())
    taken, steps = 0, []

    def gain(place: int) -> float:
        # (Of more than one width at once, where that saves more per byte: the slope of the convex hull.)
        cost, now = costs[names[place]], reached[place]
        return max((cost[now] - cost[width]) / (width - now) for width in widths if width > now) / sizes[names[place]]

    waiting = list(range(len(names)))
    for width in widths[1:]:
        room = (width - widths[0]) * total
        heap = [(-gain(place), place) for place in waiting if reached[place] < widths[-1]]
        heapq.heapify(heap)
        waiting = []
        while heap:
            _, place = heapq.heappop(heap)
            if taken + sizes[names[place]] > room:
                waiting.append(place)  # a smaller one may still fit
                continue
            taken += sizes[names[place]]
            reached[place] += 1
            steps.append(place)
            if reached[place] < widths[-1]:
                heapq.heappush(heap, (-gain(place), place))
    return Order(names, tuple(steps))


def emphasis_by_matrix(
    order: Order, costs: Mapping[str, Mapping[int, float]], sizes: Mapping[str, int], nesting: Nesting
) -> dict[str, tuple[float, ...]]:
    """What the widths of each matrix count: its shares in the costs of the rungs that read them."""
    widths = sorted(next(iter(costs.values())))
    ladder = Ladder(tuple(reversed(widths)), sizes, order)
    counts = {name: dict.fromkeys(widths, 0.0) for name in costs}
    for place in range(round((widths[-1] - widths[0]) / _STEP) + 1):
        bits = widths[0] + place * _STEP
        rung = ladder.at(bits)
        whole = sum(costs[name][width] for name, width in rung.items())
        for name, width in rung.items():
            counts[name][width] += nesting.rung(bits, widths) * costs[name][width] / max(whole, 1e-30)
    found = {}
    for name, by_width in counts.items():
        most = max(by_width.values()) or 1.0
        found[name] = tuple(float(f"{max(by_width[width] / most, _FLOOR):.4g}") for width in widths)
    return found


def is_weighed(source: CheckpointSource, plan: Plan, method: CalibratedRounding) -> bool:
    """Whether the cache holds what `ordered` measures, of a model that is calibrated."""
    from kbit.calibration.run import calibrate

    if why_uniform(plan, method) is not None:
        return True
    layers = by_layer(source, _nested_of(plan))
    calibration = calibrate(source, method.request)  # measures nothing: all is there
    return all(
        read_costs(_file(calibration, layer, wanted, method), _widths_of(wanted)) is not None
        for layer, wanted in layers.items()
    )


def _measured(
    source: CheckpointSource,
    formats: Mapping[str, NestedFormat],
    method: CalibratedRounding,
    progress: Progress | None,
) -> dict[str, dict[int, float]]:
    """What every width of every matrix costs, on text that calibration has not seen; kept beside the calibration."""
    import torch

    from kbit.calibration.held_out import held_out_factors
    from kbit.calibration.run import calibrate

    threads = torch.get_num_threads()  # while the judge is at work, torch's own are one
    calibration = calibrate(source, method.request, progress=progress)
    layers = by_layer(source, formats)
    files = {layer: _file(calibration, layer, wanted, method) for layer, wanted in layers.items()}
    missing = {layer for layer, wanted in layers.items() if read_costs(files[layer], _widths_of(wanted)) is None}
    if missing:
        if progress is not None:
            progress("weighing widths", 0, len(missing))
        for done, judge in enumerate(held_out_factors(source, method.request, lambda layer: layer not in missing)):
            wanted, factors = layers[judge.layer], calibration.read(judge.layer)
            write_costs(files[judge.layer], _costs(source, wanted, method, factors, judge.factors, threads))
            if progress is not None:
                progress("weighing widths", done + 1, len(missing))
    found: dict[str, dict[int, float]] = {}
    for layer, wanted in layers.items():
        kept = read_costs(files[layer], _widths_of(wanted))
        assert kept is not None
        found |= {name: dict(zip(sorted(wanted[name].widths), costs, strict=True)) for name, costs in kept.items()}
    return {name: found[name] for name in formats}


def _nested_of(plan: Plan) -> dict[str, NestedFormat]:
    return {t.source.name: t.format for t in plan.tensors if isinstance(t.format, NestedFormat)}


def _file(
    calibration: CalibrationFolder, layer: int | None, formats: Mapping[str, NestedFormat], method: CalibratedRounding
) -> Path:
    """Where the costs of a layer's matrices are kept."""
    identity = {
        "version": _VERSION,
        "rounding": method.rounding.identity,
        "nesting": asdict(Nesting.to_weigh()),
        "formats": {name: str(format) for name, format in formats.items()},
    }
    return costs_file(calibration, layer, identity)


def _widths_of(formats: Mapping[str, NestedFormat]) -> dict[str, Sequence[int]]:
    return {name: format.widths for name, format in formats.items()}


def _costs(
    source: CheckpointSource,
    formats: Mapping[str, NestedFormat],
    method: CalibratedRounding,
    factors: Mapping[str, Factors],
    judge: Mapping[str, Factors],
    threads: int,
) -> dict[str, list[float]]:
    """What the widths of a layer's matrices cost, the narrowest first, told by the judge's factors."""
    from kbit.calibration.workers import workers
    from kbit.quantizers.ldlq import Feedback
    from kbit.quantizers.nested import round_nested

    weights = {name: source.read(name).float() for name in formats}  # by this thread: a source has one place in a file
    settings = replace(method.rounding, sweeps=method.rounding.sweeps or SWEEPS)

    def of_matrix(name: str) -> list[float]:
        weight = weights[name]
        feedback = Feedback.of(factors[name], settings, weight.shape[1])
        matrix = round_nested(weight, formats[name], feedback, Nesting.to_weigh(), name=name)
        return [
            judge[name].divergence(weight - matrix.dequantize(width=width), 0, len(weight))
            for width in sorted(formats[name].widths)
        ]

    with workers(threads) as pool:
        by_size = sorted(formats, key=lambda name: -source.tensors[name].numel)
        return dict(zip(by_size, pool.map(of_matrix, by_size), strict=True))
