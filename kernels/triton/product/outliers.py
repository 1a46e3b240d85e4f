"""What single weights that are kept apart from a matrix's codes add to a product (kbit/formats/outlier_weights.py).

    x (M, K), out (M, N) -> out + x S^T, or act(gate) * (out + x S^T), in place

S has few weights, listed by tiles of 16 rows (`TritonWeight.outlier_spans`). A trellis's kernel adds them to its own
sums (`added`); after the other products a kernel of its own does, a program for 16 rows and up to 64 tokens, which ends
at once where a tile has none. Each weight is one load of its column of x: with as few of them as pay (a thousandth of a
matrix), that is a few microseconds' work at most. Checked in the interpreter, not timed on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kbit.kernels.triton.codecs.layout import ROW_TILE, TritonWeight
from kbit.kernels.triton.rows.activate import act

_MOST_TOKENS = 64


@triton.jit
def added(sums, x_ptr, x_row, stride_x, seen, stored, spans_ptr, places_ptr, values_ptr):
    """sums (16, BM) of a tile of rows, with its outliers times the tokens at rows x_row (BM,) of x."""
    for i in range(tl.load(spans_ptr + 2 * stored), tl.load(spans_ptr + 2 * stored + 1)):
        own = tl.arange(0, 16)[:, None] == tl.load(places_ptr + 2 * i)
        at = x_ptr + x_row[None, :] * stride_x + tl.load(places_ptr + 2 * i + 1)
        x = tl.load(at, mask=seen[None, :], other=0.0).to(tl.float32)
        sums += tl.where(own, tl.load(values_ptr + i), 0.0) * x
    return sums


@triton.jit
def outliers_kernel(
    x_ptr, out_ptr, gate_ptr, order_ptr, expert_ptr, spans_ptr, places_ptr, values_ptr,
    tokens, out_rows, stride_x, stride_out, stride_gate,
    BM: tl.constexpr, GATE: tl.constexpr, GROUPED: tl.constexpr, TOP: tl.constexpr,
):  # fmt: skip
    """Grid (N' / 16, token tiles); GATE, GROUPED and TOP as in gemm_kernel."""
    tile = tl.program_id(0)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    stored = tile
    if GROUPED:
        expert = tl.load(expert_ptr + tl.program_id(1))
        if expert < 0:
            return
        stored = expert * tl.num_programs(0) + tile
        m = tl.load(order_ptr + m)
    if GATE == "":  # noqa: SIM102 - decided when it is compiled
        if tl.load(spans_ptr + 2 * stored) == tl.load(spans_ptr + 2 * stored + 1):
            return
    rows = tile * 16 + tl.arange(0, 16)[:, None]
    seen = (rows < out_rows) & (m[None, :] < tokens)
    at = out_ptr + m[None, :] * stride_out + rows
    sums = tl.load(at, mask=seen, other=0.0).to(tl.float32)
    x_row = tl.where(m < tokens, m // TOP, 0)
    sums = added(sums, x_ptr, x_row, stride_x, m < tokens, stored, spans_ptr, places_ptr, values_ptr)
    if GATE != "":
        gate = tl.load(gate_ptr + m[None, :] * stride_gate + rows, mask=seen, other=0.0).to(tl.float32)
        sums = act(gate, GATE) * sums
    tl.store(at, sums.to(out_ptr.dtype.element_ty), mask=seen)


def add_outliers(
    x: torch.Tensor,
    weight: TritonWeight,
    out: torch.Tensor,
    *,
    gate: torch.Tensor | None = None,
    kind: str = "",
    order: torch.Tensor | None = None,
    experts: torch.Tensor | None = None,
    tile: int = 0,
    top: int = 1,
) -> torch.Tensor:
    """A product with what is kept apart added to it, in place; with `gate`, then times act(gate).

    Args:
        x: (M, K), contiguous rows.
        weight: one that keeps weights apart; of experts, stacked.
        out: (M, N), the product with its codes, which is rounded to out's type twice.
        gate, kind: see `grouped.grouped_matmul`.
        order, experts, tile, top: of tokens that are sorted by expert, as in its groups.

    Returns:
        out.
    """
    assert weight.outlier_spans is not None
    tokens, rows = out.shape
    block = tile or min(_MOST_TOKENS, max(16, triton.next_power_of_2(tokens)))
    count = triton.cdiv(tokens if order is None else len(order), block)
    outliers_kernel[(weight.padded[0] // ROW_TILE, count)](
        x, out, out if gate is None else gate, out if order is None else order, out if experts is None else experts,
        weight.outlier_spans, weight.outlier_places, weight.outliers,
        tokens, rows, x.stride(0), out.stride(0), 0 if gate is None else gate.stride(0),
        BM=block, GATE="" if gate is None else kind, GROUPED=order is not None, TOP=top, num_warps=4,
    )  # fmt: skip
    return out
