"""Rounding in turn: what is rounded already is made good by what is not, against the divergence from the original.

Rounding goes by the second moment of the gradients, matrix by matrix; what errors of several matrices do together, and
what is not quadratic, only the model itself can tell. So matrices are rounded a few at a time, from the first layer on.
After each time all others, which are whole numbers still, are trained on the divergence from the original, so that they
undo what they can of the errors before them; it is these weights that are rounded next (tuning between roundings, as
AQLM, arXiv 2401.06118, and QTIP, arXiv 2406.11235, have it for blocks; here it is the whole model and its last logits).
Every row's scales get one factor from the time they are rounded, and so does every weight of a norm, which is a factor
for the columns of the matrices behind it and takes no further bytes. All are found by Adam on text of the calibration.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from kbit.calibration.workers import workers
from kbit.checkpoint.source import CheckpointSource
from kbit.formats.outlier_weights import scaled_outliers
from kbit.formats.quant_format import QuantFormat
from kbit.formats.quant_tensor import QuantTensor
from kbit.formats.trellis import TrellisFormat
from kbit.host.progress import Progress
from kbit.quantizers.distillation import Given, Pair
from kbit.quantizers.settings import Tuning


@dataclass(frozen=True, eq=False)
class Tuned:
    """What rounding in turn has made.

    Attributes:
        matrices: rounded, with the factors of their rows in their scales, by name.
        norms: factors for the weights of norms, by name, float32 (N,).
    """

    matrices: Mapping[str, QuantTensor]
    norms: Mapping[str, torch.Tensor]


def can_scale(matrix: QuantTensor) -> bool:
    """Whether its rows have scales of their own."""
    format = matrix.format
    return isinstance(format, TrellisFormat) or (isinstance(format, QuantFormat) and not format.double_quant)


def scale_rows(matrix: QuantTensor, factors: torch.Tensor | None) -> QuantTensor:
    """The matrix with each row's scales (and offsets) times a factor (N,), rounded to what its format stores."""
    if factors is None:
        return matrix
    assert can_scale(matrix)
    stored = dict(matrix.stored)
    for name in ("scales", "offsets"):
        if name in stored:
            stored[name] = (stored[name].float() * factors[:, None]).to(stored[name].dtype)
    stored |= scaled_outliers(stored, matrix.shape[1], factors)
    return replace(matrix, stored=stored)


def in_turns(sizes: Mapping[str, int], turns: int) -> list[list[str]]:
    """Names in their order, in at most so many groups of about the same size together."""
    total, before = sum(sizes.values()), 0
    groups: dict[int, list[str]] = {}
    for name, size in sizes.items():
        groups.setdefault(turns * (2 * before + size) // (2 * total), []).append(name)
        before += size
    return list(groups.values())


def round_in_turn(
    source: CheckpointSource,
    start: CheckpointSource,
    targets: Mapping[str, torch.Tensor],
    rounded: Callable[[str, torch.Tensor], QuantTensor],
    text: NDArray[np.int64],
    tuning: Tuning,
    *,
    progress: Progress | None = None,
) -> Tuned:
    """Linear matrices rounded in turn.

    Holds the original as it is stored; and in float32 the model twice, and for each of its weights a gradient for every
    thread and two moments.

    Args:
        source: the original.
        start: the same; what it has of other matrices (embeddings, the head) is kept.
        targets: what is to be rounded, float32 (N, K) by name, in the order of layers; changed in place.
        rounded: rounds a matrix of that name; called by several threads.
        text: sequences, int64 (S, T).
        tuning: how.
        progress: told of steps.
    """
    threads = torch.get_num_threads()
    with workers(threads) as pool:
        pair = Pair(source, start, pool, threads)
        weights = dict(targets)
        factors = {name: torch.ones(size) for name, size in pair.norms.items()}
        groups = in_turns({name: weight.numel() for name, weight in weights.items()}, tuning.turns)
        matrices: dict[str, QuantTensor] = {}
        for turn, group in enumerate(groups):
            for name, matrix in zip(group, pool.map(lambda name: rounded(name, weights[name]), group), strict=True):
                matrices[name] = matrix
                weights[name] = matrix.dequantize()
                if can_scale(matrix):
                    factors[name] = torch.ones(len(weights[name]))
            free = Given({name: weight for name, weight in weights.items() if name not in matrices}, factors)
            fixed = Given({name: weights[name] for name in matrices})
            for step in range(tuning.steps if factors or free.weights else 0):
                if step == 0:
                    optimizer = _optimizer(free, tuning)
                first = (turn * tuning.steps + step) * tuning.batch
                batch = np.take(text, range(first, first + tuning.batch), axis=0, mode="wrap")
                for group_of in optimizer.param_groups:
                    group_of["lr"] = group_of["first"] * 0.5 * (1 + math.cos(math.pi * step / tuning.steps))
                for value, gradient in zip(free.all(), pair.gradients(free, fixed, batch), strict=True):
                    value.grad = gradient
                optimizer.step()
                if progress is not None:
                    progress("rounding and tuning", turn * tuning.steps + step + 1, len(groups) * tuning.steps)
            for value in free.all():
                value.grad = None
    norms = {name: factor for name, factor in factors.items() if name not in matrices}
    return Tuned({name: scale_rows(matrix, factors.get(name)) for name, matrix in matrices.items()}, norms)


def _optimizer(free: Given, tuning: Tuning) -> torch.optim.Optimizer:
    """Adam, whose steps are as large as its rate: of weights in shares of their matrix's root mean square."""
    rates: list[tuple[torch.Tensor, float]] = [(factor, tuning.rate) for factor in free.factors.values()]
    rates += [(weight, tuning.weight_rate * _size(weight)) for weight in free.weights.values()]
    groups: Sequence[dict[str, object]] = [{"params": [value], "lr": rate, "first": rate} for value, rate in rates]
    return torch.optim.Adam(groups, betas=(0.9, 0.95))


def _size(weight: torch.Tensor) -> float:
    return float(weight.square().mean(dtype=torch.float64).sqrt())
