"""What layers compute in place of attention, beside delta nets, but for the last linear."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kbit.graph.ops import Ops, X
from kbit.models.mixer_specs import ConvNet, ScanNet
from kbit.models.params_recurrent import CONV, SCAN
from kbit.models.spec import ModelSpec

if TYPE_CHECKING:
    from kbit.models.blocks import Weights


def convolved(ops: Ops[X], conv: ConvNet, weights: Weights, index: int, normed: X) -> X:
    """c conv(b x), of three linears of one input (LFM2): (..., hidden) -> (..., features)."""
    b, c, x = together(ops, weights, CONV, normed)
    taps, bias = weights.biases["conv_taps"], weights.biases.get("conv_taps_bias")
    return ops.multiply(c, ops.short_convolution(ops.multiply(b, x), taps, conv.at(index), bias))


def scanned(ops: Ops[X], spec: ModelSpec, scan: ScanNet, weights: Weights, index: int, normed: X) -> X:
    """Mamba-2 (Dao and Gu 2024): (..., hidden) -> (..., H D_v).

    Values, keys and queries are convolved over a few tokens and activated before they reach the state; what it says is
    multiplied with a gate, whose activation is a silu always, and normalised. (Factors on what is convolved are in the
    taps, and of steps in their bias, too: `kbit.models.load`.)
    """
    convolution, space = scan.at(index)
    z, x, steps = together(ops, weights, (*SCAN, "scan_steps"), normed)
    z, steps = scaled(ops, z, scan.gate), scaled(ops, steps, scan.steps)
    x = ops.short_convolution(x, weights.biases["scan_taps"], convolution, weights.biases.get("scan_taps_bias"))
    x = ops.activate(x, None, scan.activation)
    out = ops.scan(x, steps, weights.biases["scan_rates"], weights.biases["scan_skips"], space)
    out = ops.activate(z, out, "silu")
    return ops.norm(out, weights.norms["scan_norm"], spec.norm_eps, scan.norms, scan.norms == 1) if scan.norms else out


def scaled(ops: Ops[X], x: X, factor: float) -> X:
    """factor x: (..., K)."""
    return x if factor == 1.0 else ops.scale(x, factor)


def together(ops: Ops[X], weights: Weights, slots: tuple[str, ...], x: X) -> tuple[X, ...]:
    """Linears that share an input."""
    linears = weights.linears(slots)
    return ops.linear_group([linear.weight for linear in linears], x, [linear.bias for linear in linears])
