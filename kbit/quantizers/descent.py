"""Coordinate descent on a rounded matrix: each scale and code to what costs least while all others stay.

What feedback (kbit.quantizers.ldlq) cannot do is look back: a weight that is rounded first does not know the errors of
those after it, and a block's scale is chosen before its codes. Sweeps over the finished matrix mend that. The cost is
tr(H_O E H_I E'), so each step is exact and none can raise it (QuantEase, arXiv 2309.01885, does so for codes and H_I).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kbit import _native
from kbit.backends.reference.products import product, product_with_rows

# Rows that are worked on at once; what they do is told to the others afterwards, to those of its group at once.
_ROWS, _TOGETHER = 16, 64


@dataclass(frozen=True, eq=False)
class Curvature:
    """What errors cost, as rounding sees it: the factors with their damping, in any unit.

    Attributes:
        inputs: H_I (K, K), float32.
        outputs: H_O (N, N), float32; None for the identity.
    """

    inputs: torch.Tensor
    outputs: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class Rounded:
    """A matrix's codes and scales, changed in place.

    Attributes:
        levels, codes_of_levels: the values that codes stand for, ascending, float32 and uint8 (L,).
        block: weights of a scale.
        scale_type: what scales are rounded to: "fp16", "bf16" or "fp32".
        fixed_scales: leave scales and offsets as they are.
        codes: (N, K), uint8.
        scales, offsets: (N, blocks), float32; offsets None for a format without.
    """

    levels: torch.Tensor
    codes_of_levels: torch.Tensor
    block: int
    scale_type: str
    fixed_scales: bool
    codes: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor | None


def descend(rounded: Rounded, error: torch.Tensor, curvature: Curvature, sweeps: int) -> None:
    """Lower what a matrix's errors cost.

    Args:
        rounded: the matrix.
        error: the weights less what `rounded` stands for, float32 (N, K).
        curvature: what errors cost.
        sweeps: over all weights.
    """
    count, columns = error.shape
    inputs, outputs = curvature.inputs, curvature.outputs
    first = product_with_rows(error, inputs)  # symmetric
    if outputs is not None:
        first = product(outputs, first)
    alone = torch.eye(_ROWS)
    heard = torch.zeros_like(error)  # H_I of all changes so far
    for _ in range(sweeps):
        for start in reversed(range(0, count, _TOGETHER)):
            group = slice(start, min(start + _TOGETHER, count))
            slopes = first[group] - (heard[group] if outputs is None else product(outputs[group], heard))
            for begin in reversed(range(0, group.stop - start, _ROWS)):
                within = slice(begin, min(begin + _ROWS, group.stop - start))
                rows = slice(start + within.start, start + within.stop)
                size = rows.stop - rows.start
                among = (alone[:size, :size] if outputs is None else outputs[rows, rows]).contiguous()
                change = torch.empty(size, columns)
                _native.descend_rows(
                    slopes[within], inputs, among, rounded.levels, rounded.codes_of_levels, rounded.block,
                    rounded.scale_type, rounded.fixed_scales, rounded.codes[rows], rounded.scales[rows],
                    None if rounded.offsets is None else rounded.offsets[rows], change,
                )  # fmt: skip
                told = product_with_rows(change, inputs)
                heard[rows] += told
                if outputs is not None and begin:
                    slopes[:begin] -= product(outputs[start : start + begin, rows], told)
