"""x W^T with trellis codes, for any number of tokens: tokens are rotated, then tiles decoded and multiplied.

Shapes: x (M, K), W (N, K) prepared by `layout.prepare_weight`, out (M, N).

A program owns 16 rows of W and up to 64 tokens. It decodes 64 columns at a time to levels (`codecs.trellis`),
multiplies them with the tokens on the tensor cores and sums in float32; a row's scale comes last, then bias, residual
or the gate's activation. Single weights that are kept apart from the codes are added one by one to the sums of their
tile, with the tokens as they were. Tokens sorted by expert (`grouped`) go through the same kernel, experts stacked
along the row tiles.

Roofline: memory bandwidth for few tokens if decoding kept up, which 17 to 25 instructions a weight do not (an H100 has
2 to 4 of them in that time). A first version: checked in the interpreter and by its machine code, not timed on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kbit.kernels.triton.codecs.layout import ROW_TILE, TritonWeight
from kbit.kernels.triton.codecs.trellis import rotate_tokens, trellis_levels
from kbit.kernels.triton.product.gemv import check_product, dot_precision
from kbit.kernels.triton.product.outliers import added
from kbit.kernels.triton.rows.activate import act
from kbit.kernels.triton.target import current_arch

_COLUMNS, _MOST_TOKENS = 64, 64


@triton.jit
def trellis_kernel(
    x_ptr, out_ptr, bias_ptr, residual_ptr, gate_ptr, order_ptr, expert_ptr, words_ptr, scales_ptr,
    plain_ptr, spans_ptr, places_ptr, apart_ptr,
    tokens, out_rows, columns, row_tiles, stride_x, stride_out, stride_residual, stride_gate, stride_plain, step,
    BITS: tl.constexpr, HALF: tl.constexpr, CODE: tl.constexpr, WINDOW: tl.constexpr, BM: tl.constexpr,
    COLUMNS: tl.constexpr, PRECISION: tl.constexpr, GATE: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    GROUPED: tl.constexpr, TOP: tl.constexpr, OUTLIERS: tl.constexpr,
):  # fmt: skip
    """Grid (N' / 16, token tiles). With GATE the result is act(gate) times the product; GROUPED and TOP as in
    gemm_kernel. With OUTLIERS weights that are kept apart meet the tokens as they are (plain)."""
    tile = tl.program_id(0)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    k = tl.arange(0, COLUMNS)
    stored = tile  # the tile's place among those of all experts
    if GROUPED:
        expert = tl.load(expert_ptr + tl.program_id(1))
        if expert < 0:
            return
        stored = expert * tl.num_programs(0) + tile
        m = tl.load(order_ptr + m)
    x_row = tl.where(m < tokens, m // TOP, 0)
    acc = tl.zeros((16, BM), tl.float32)
    for first in range(0, columns, COLUMNS):
        levels = trellis_levels(words_ptr, stored, first // 16, row_tiles, BITS, HALF, CODE, WINDOW, COLUMNS)
        seen = (m[None, :] < tokens) & (first + k[:, None] < columns)
        x = tl.load(x_ptr + x_row[None, :] * stride_x + first + k[:, None], mask=seen, other=0.0)
        acc += tl.dot(levels.to(x_ptr.dtype.element_ty), x, input_precision=PRECISION)
    rows = tile * 16 + tl.arange(0, 16)[:, None]
    seen = (rows < out_rows) & (m[None, :] < tokens)
    scale = tl.load(scales_ptr + stored * 16 + tl.arange(0, 16)[:, None]).to(tl.float32)
    sums = acc * (scale * step)
    if OUTLIERS:
        sums = added(sums, plain_ptr, x_row, stride_plain, m < tokens, stored, spans_ptr, places_ptr, apart_ptr)
    if BIAS:
        sums += tl.load(bias_ptr + rows, mask=rows < out_rows, other=0.0).to(tl.float32)
    if RESIDUAL:
        sums += tl.load(residual_ptr + m[None, :] * stride_residual + rows, mask=seen, other=0.0).to(tl.float32)
    if GATE != "":
        gate = tl.load(gate_ptr + m[None, :] * stride_gate + rows, mask=seen, other=0.0).to(tl.float32)
        sums = act(gate, GATE) * sums
    tl.store(out_ptr + m[None, :] * stride_out + rows, sums.to(out_ptr.dtype.element_ty), mask=seen)


def trellis_product(
    x: torch.Tensor,
    weight: TritonWeight,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    *,
    gate: torch.Tensor | None = None,
    kind: str = "",
) -> torch.Tensor:
    """x W^T (+ bias) (+ residual), or act(gate) * x W^T.

    Args:
        x: (M, K), the dtype the weight was prepared for, contiguous rows.
        weight: (N, K), a trellis.
        bias: (N,) or None, any float dtype.
        residual: (M, N) or None, any float dtype.
        out_dtype: of the result; x's by default.
        gate: (M, N) or None, any float dtype.
        kind: activation of the gate.

    Returns:
        (M, N).

    Raises:
        UnsupportedError: the arguments do not fit together.
    """
    check_product(x, weight, bias, residual, kind=kind, gate=gate)
    tokens, rows = x.shape[0], weight.shape[0]
    out = torch.empty((tokens, rows), dtype=out_dtype or x.dtype, device=x.device)
    block = min(_MOST_TOKENS, max(16, triton.next_power_of_2(tokens)))
    launch_trellis(x, weight, out, block, triton.cdiv(tokens, block), bias, residual, gate, kind)
    return out


def launch_trellis(
    x: torch.Tensor,
    weight: TritonWeight,
    out: torch.Tensor,
    block: int,
    token_tiles: int,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    kind: str = "",
    order: torch.Tensor | None = None,
    experts: torch.Tensor | None = None,
    top: int = 1,
) -> None:
    """Rotate the tokens and launch trellis_kernel; arguments as its, checked by the caller.

    Args:
        block: tokens of a program, a power of two from 16.
    """
    assert weight.rotation is not None
    assert weight.scales is not None
    turned = rotate_tokens(x, weight.rotation, weight.mixed)
    tokens, rows = out.shape
    apart = (weight.outlier_spans, weight.outlier_places, weight.outliers)
    trellis_kernel[(weight.padded[0] // ROW_TILE, token_tiles)](
        turned, out, out if bias is None else bias, out if residual is None else residual,
        out if gate is None else gate, out if order is None else order, out if experts is None else experts,
        weight.planes[0], weight.scales, x, *(out if part is None else part for part in apart),
        tokens, rows, turned.shape[1], turned.shape[1] // 16, turned.stride(0), out.stride(0),
        0 if residual is None else residual.stride(0), 0 if gate is None else gate.stride(0), x.stride(0),
        weight.multiplier,
        BITS=weight.bits, HALF=int(weight.half), CODE=weight.kind.removeprefix("trellis-"), WINDOW=weight.window,
        BM=block, COLUMNS=_COLUMNS, PRECISION=dot_precision(x.dtype, current_arch()), GATE="" if gate is None else kind,
        BIAS=bias is not None, RESIDUAL=residual is not None, GROUPED=order is not None, TOP=top,
        OUTLIERS=weight.outliers is not None, num_warps=4,
    )  # fmt: skip
