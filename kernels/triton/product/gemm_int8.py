"""x W^T with activations rounded to int8, on integer tensor cores (W4A8).

Shapes: x (M, K), W (N, K) from `rounded.with_activations(weight, "int8")`, out (M, N).

Activations have one float32 scale per token and segment of columns, the largest magnitude over 127; a segment is as
wide as the columns that share a scale of the weight, at most 128 (`rounded.segment_of`). Integer codes are multiplied
as they are, codebooks of up to 5 bits rounded to int8. What that costs, as mean KL divergence from exact activations
(nf4-b64, WikiText-2, 512 and 1024 tokens; rounding the weights to 4 bits costs 0.27 on the first model):

    SmolLM2-135M, a scale per token        0.0288      per 128 columns 0.0073      per 64 0.0042      per 32 0.0023
    novels-5m                              0.00085                     0.00030            0.00019            0.00013
    with the codebook rounded too (64)     0.0046, 0.00021

A scale per token would save an instruction per sum and segment; it is not offered, because tokens with a spike (the
first of a text, here) lose everything else they hold.

Roofline: tensor cores at int8 rate (twice fp16's, four times on the GeForce cards, whose fp16 products with float32
sums are halved); memory bandwidth for the codes with few tokens. Estimates against gemm: `configs.rounded_config`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kbit.kernels.triton.codecs.layout import TritonWeight
from kbit.kernels.triton.product.configs import GemmConfig
from kbit.kernels.triton.product.rounded import RoundedTokens, product, source_column, tokens_layout, with_activations

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


def round_tokens(x: torch.Tensor, weight: TritonWeight) -> RoundedTokens:
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


def gemm_int8(
    x: torch.Tensor,
    weight: TritonWeight,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    *,
    rounded: RoundedTokens | None = None,
    gate: torch.Tensor | None = None,
    kind: str = "",
    config: GemmConfig | None = None,
) -> torch.Tensor:
    """x W^T (+ bias) (+ residual) with x rounded to int8; or act(gate) * (x W^T) (+ bias) (+ residual).

    Args:
        x: (M, K), M >= 1, the dtype the weight was prepared for, contiguous rows.
        weight: (N, K); marked by `rounded.with_activations`, or marked here.
        bias: (N,) or None, any float dtype.
        residual: (M, N) or None, any float dtype.
        out_dtype: of the result; x's by default.
        rounded: x from `round_tokens`, where several weights of one layout share it.
        gate: (M, N) or None: the gate's product, before its activation.
        kind: the activation, "silu", "gelu", "gelu_tanh" or "relu".
        config: block sizes (split is ignored); chosen for the GPU by default.

    Returns:
        (M, N).

    Raises:
        UnsupportedError: the arguments do not fit together, or a format the kernel does not take.
    """
    return product(
        x, with_activations(weight, "int8"), round_tokens, bias, residual, out_dtype,
        rounded=rounded, gate=gate, kind=kind, config=config,
    )  # fmt: skip
