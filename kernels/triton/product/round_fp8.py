"""Activations rounded to fp8 (e4m3), for products on fp8 tensor cores: sm_89, sm_90, sm_100, sm_120.

Each token has one float32 scale, which brings its largest value to 448, e4m3's own; e4m3 spans 17 octaves below that,
so that a spike does not take the rest of its token along. (A scale per 64 columns would help by less than the kernel's
time would suffer.) This rounds more than int8 with scales per segment (docs/measurements.md): e4m3 keeps 4 significant
bits of everything, int8 7 of what is large. What it has for it is the sum: a multiplication and addition per sum and
block where int8 takes three instructions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kbit.kernels.triton.codecs.layout import TritonWeight
from kbit.kernels.triton.product.rounded import RoundedTokens, source_column, tokens_layout

_COLUMNS = 2048


@triton.jit
def e4m3(x):
    """float32 of at most 448 in magnitude -> the bits of e4m3, rounded to nearest even, int8.

    By arithmetic instead of a conversion: Triton's interpreter truncates, and kernels are tested there.
    """
    # 2^e <= |x| < 2^(e + 1), from e4m3's smallest normal exponent on; steps of e4m3 are 2^(e - 3) there
    power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    large = tl.maximum(power, 0.015625) * 1572864.0  # 1.5 * 2^20: a float32 of this size has that step
    bits = ((x + large) - large).to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = (size >> 20) - (120 << 3)
    small = (size.to(tl.float32, bitcast=True) * 512.0).to(tl.int32)
    return (tl.where(size >= 0x3C800000, normal, small) | ((bits >> 24) & 0x80)).to(tl.int8)


@triton.jit
def round_fp8_kernel(
    x_ptr, out_ptr, scales_ptr, columns, padded_columns, stride_x, turns, ORDER: tl.constexpr, BLOCK: tl.constexpr
):
    """One token per program: the bits of e4m3 (M, K'), scales (M,). Grid (M,)."""
    m = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), tl.float32)
    for turn in range(turns):
        at = turn * BLOCK + k
        x = tl.load(x_ptr + m * stride_x + at, mask=at < columns, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x))
    scale = tl.max(largest, axis=0) / 448.0
    tl.store(scales_ptr + m, scale)
    inverse = tl.where(scale > 0.0, 1.0 / scale, 0.0)
    for turn in range(turns):
        at = turn * BLOCK + k
        source = source_column(at, ORDER)
        x = tl.load(x_ptr + m * stride_x + source, mask=source < columns, other=0.0).to(tl.float32) * inverse
        x = tl.minimum(tl.maximum(x, -448.0), 448.0)
        tl.store(out_ptr + m * padded_columns + at, e4m3(x), mask=at < padded_columns)


def round_fp8(x: torch.Tensor, weight: TritonWeight) -> RoundedTokens:
    """Round each token of x (M, K) to e4m3, for products with this weight and others of its layout."""
    tokens, columns = x.shape
    layout = tokens_layout(weight)
    _, padded_columns, _, order = layout
    out = torch.empty((tokens, padded_columns), dtype=torch.int8, device=x.device)
    scales = torch.empty((1, tokens), dtype=torch.float32, device=x.device)
    block = min(_COLUMNS, triton.next_power_of_2(padded_columns))
    round_fp8_kernel[(tokens,)](
        x, out, scales, columns, padded_columns, x.stride(0), triton.cdiv(padded_columns, block),
        ORDER=order, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return RoundedTokens(out.view(torch.float8_e4m3fn), scales, layout)
