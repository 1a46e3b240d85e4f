"""What layers compute in place of attention, beside delta nets, but for the last linear."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kbit.graph.ops import Ops, X
from kbit.models.mixer_specs import ConvNet
from kbit.models.params import CONV

if TYPE_CHECKING:
    from kbit.models.blocks import Weights


def convolved(ops: Ops[X], conv: ConvNet, weights: Weights, index: int, normed: X) -> X:
    """c conv(b x), of three linears of one input (LFM2): (..., hidden) -> (..., features)."""
    b, c, x = together(ops, weights, CONV, normed)
    taps, bias = weights.biases["conv_taps"], weights.biases.get("conv_taps_bias")
    return ops.multiply(c, ops.short_convolution(ops.multiply(b, x), taps, conv.at(index), bias))


def together(ops: Ops[X], weights: Weights, slots: tuple[str, ...], x: X) -> tuple[X, ...]:
    """Linears that share an input."""
    linears = weights.linears(slots)
    return ops.linear_group([linear.weight for linear in linears], x, [linear.bias for linear in linears])
