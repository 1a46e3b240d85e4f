"""Activations and gated activations: act(gate) * up.

    gate, up (M, K) fp16, bf16 or fp32 -> (M, K)

Element-wise; a program has a run of one row. The roofline is memory: 3 K elements a row. Rows may have a stride, so
gate and up can be halves of one matrix. `act` is for other kernels' epilogues too.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kbit.kernels.triton.rows.rows import as_rows

KINDS = ("silu", "gelu", "gelu_tanh", "relu", "elu")

# Elements of a program: 8 a thread with 4 warps, one 128-bit load of half-precision values each.
_BLOCK = 1024


@triton.jit
def less_one(x):
    """e^x - 1 of fp32 values that are not positive: near zero by its series, whose next term is below 2e-7 of it."""
    series = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7))))))
    return tl.where(x > -0.5, series, tl.exp(x) - 1.0)


@triton.jit
def act(x, KIND: tl.constexpr):
    """One of KINDS of fp32 values; see kernels/reference.py for the definitions.

    The tanh approximation of GELU, x (1 + tanh(u)) / 2, equals x sigmoid(2 u): no tanh is needed.
    """
    if KIND == "silu":
        out = x * tl.sigmoid(x)
    elif KIND == "gelu":
        out = 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        out = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif KIND == "elu":
        out = tl.where(x > 0.0, x, less_one(tl.minimum(x, 0.0)))
    else:
        tl.static_assert(KIND == "relu", "unknown activation")
        out = tl.maximum(x, 0.0)
    return out


@triton.jit
def activate_kernel(
    gate_ptr,
    up_ptr,
    out_ptr,
    columns,
    stride_gate,
    stride_up,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """act(gate) * up for BLOCK columns of a row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < columns
    out = act(tl.load(gate_ptr + row * stride_gate + at, mask=mask, other=0.0).to(tl.float32), KIND)
    if GATED:
        out *= tl.load(up_ptr + row * stride_up + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * columns + at, out.to(out_ptr.dtype.element_ty), mask=mask)


def activate(
    gate: torch.Tensor, up: torch.Tensor | None, kind: str, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """act(gate) * up, or act(gate).

    Args:
        gate: (..., K), features contiguous.
        up: like gate, or None.
        kind: one of KINDS.
        out_dtype: type of the result, by default that of gate.

    Returns:
        (..., K).

    Raises:
        ValueError: unknown kind, or shapes that differ.
    """
    if kind not in KINDS:
        raise ValueError(f"activation {kind!r} is not one of {', '.join(KINDS)}")
    if up is not None and up.shape != gate.shape:
        raise ValueError(f"activate: up {tuple(up.shape)} is not {tuple(gate.shape)}")
    rows = as_rows(gate)
    others = rows if up is None else as_rows(up)
    out = torch.empty(gate.shape, dtype=out_dtype or gate.dtype, device=gate.device)
    if gate.numel():
        grid = (rows.shape[0], triton.cdiv(rows.shape[1], _BLOCK))
        activate_kernel[grid](
            rows,
            others,
            out,
            rows.shape[1],
            rows.stride(0),
            others.stride(0),
            KIND=kind,
            GATED=up is not None,
            BLOCK=_BLOCK,
            num_warps=4,
        )
    return out
