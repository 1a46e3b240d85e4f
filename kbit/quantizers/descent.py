"""Coordinate descent on a rounded matrix: each scale and code to what costs least while all others stay.

What feedback (kbit.quantizers.ldlq) cannot do is look back: a weight that is rounded first does not know the errors of
those after it, and a block's scale is chosen before its codes. Sweeps over the finished matrix mend that. The cost is
tr(H_O E H_I E'), so each step is exact and none can raise it (QuantEase, arXiv 2309.01885, does so for codes and H_I).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kbit import _native

# Rows that are worked on at once; what they do is told to the others afterwards.
_ROWS = 16


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
    slopes = error @ inputs
    if outputs is not None:
        slopes = outputs @ slopes
    alone = torch.eye(_ROWS)
    for _ in range(sweeps):
        for start in reversed(range(0, count, _ROWS)):
            rows = slice(start, min(start + _ROWS, count))
            size = rows.stop - start
            among = (alone[:size, :size] if outputs is None else outputs[rows, rows]).contiguous()
            change = torch.empty(size, columns)
            _native.descend_rows(
                slopes[rows], inputs, among, rounded.levels, rounded.codes_of_levels, rounded.block, rounded.scale_type,
                rounded.fixed_scales, rounded.codes[rows], rounded.scales[rows],
                None if rounded.offsets is None else rounded.offsets[rows], change,
            )  # fmt: skip
            heard = change @ inputs
            if outputs is None:
                slopes[rows] -= heard
            else:
                slopes.addmm_(outputs[:, rows], heard, alpha=-1)
