"""Activations rounded to int8, for products on integer tensor cores (W4A8).

One float32 scale per token and segment of columns, the largest magnitude over 127; a segment is as wide as the columns
that share a scale of the weight, at most 128 (`rounded.segment_of`). A scale per token would save an instruction per
sum and segment; it is not offered: tokens with a spike (the first of a text, in some models) would lose everything else
they hold: several times the error (docs/measurements.md).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kbit.kernels.triton.codecs.layout import TritonWeight
from kbit.kernels.triton.product.rounded import RoundedTokens, source_column, tokens_layout

# Columns that a program of the rounding kernel takes at most.
_COLUMNS = 2048


@triton.jit
def round_int8_kernel(
    x_ptr, out_ptr, scales_ptr, tokens, columns, padded_columns, segments, stride_x,
    SEGMENT: tl.constexpr, ORDER: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """RUN segments of a token per program: int8 (M, K'), scales (segments, M). Grid (M, ceil(segments / RUN))."""
    m = tl.program_id(0).to(tl.int64)
    segment = tl.program_id(1) * RUN + tl.arange(0, RUN)
    at = segment[:, None] * SEGMENT + tl.arange(0, SEGMENT)[None, :]
    source = source_column(at, ORDER)  # of the same segment
    x = tl.load(x_ptr + m * stride_x + source, mask=source < columns, other=0.0).to(tl.float32)
    scale = tl.max(tl.abs(x), axis=1) / 127.0
    inverse = tl.where(scale > 0.0, 1.0 / scale, 0.0)
    x = tl.minimum(tl.maximum(x * inverse[:, None], -127.0), 127.0)
    rounded = tl.floor(x + 0.5).to(tl.int8)
    tl.store(out_ptr + m * padded_columns + at, rounded, mask=at < padded_columns)
    tl.store(scales_ptr + segment * tokens + m, scale, mask=segment < segments)


def round_int8(x: torch.Tensor, weight: TritonWeight) -> RoundedTokens:
    """Round each segment of each token of x (M, K) to int8, for products with this weight and others of its layout."""
    tokens, columns = x.shape
    layout = tokens_layout(weight)
    _, padded_columns, segment, order = layout
    segments = padded_columns // segment
    out = torch.empty((tokens, padded_columns), dtype=torch.int8, device=x.device)
    scales = torch.empty((segments, tokens), dtype=torch.float32, device=x.device)
    run = min(_COLUMNS // segment, triton.next_power_of_2(segments))
    round_int8_kernel[(tokens, triton.cdiv(segments, run))](
        x, out, scales, tokens, columns, padded_columns, segments, x.stride(0),
        SEGMENT=segment, ORDER=order, RUN=run, num_warps=4,
    )  # fmt: skip
    return RoundedTokens(out, scales, layout)
