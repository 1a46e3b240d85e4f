"""x W^T with activations rounded to int8, on integer tensor cores at twice the rate, for integer formats.

Shapes: x (M, K), W (N, K) prepared by `layout.prepare_weight` in a symmetric integer format, out (M, N).

Never chosen by itself: rounding x costs accuracy (each token to 255 levels of its largest magnitude, 0.4 % of it at
most per value), so a caller asks for it by name. `quantize_tokens` writes int8 activations with one float32 scale per
token, each 16 columns in the order of `codes.operand`, so that the int8 fragments (mma.m16n8k32: four neighbouring
columns per lane) of W are again decoded where they were loaded, and x needs no rearranging on its way through shared
memory. Products of a block are summed exactly in int32, then scaled in float32.

A program owns TILES x 16 rows and BM tokens, as in gemm.

Roofline: tensor cores at int8 rate; memory bandwidth for the codes with few tokens. Converting and scaling the sums of
every block is what it spends most on: the offline model of sm_90 puts it level with half precision at blocks of 128
(256 x 4096 x 4096), ahead of it with larger blocks or a scale per row, behind it at 64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kbit.errors import UnsupportedError
from kbit.kernels.triton.codes import decode_int8, load_planes, load_scale, operand, part
from kbit.kernels.triton.configs import GemmConfig, gemm_int8_config
from kbit.kernels.triton.gemm import tokens_per_launch
from kbit.kernels.triton.gemv import check_product, problem_of, weight_pointers
from kbit.kernels.triton.layout import ROW_TILE, TritonWeight
from kbit.kernels.triton.target import current_arch


@triton.jit
def quantize_tokens_kernel(x_ptr, out_ptr, scales_ptr, columns, padded_columns, stride_x, turns, BLOCK: tl.constexpr):
    """One token per program: int8 row (K',) with 16 columns in the order (t, k8, k0), and its scale. Grid (M,)."""
    m = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), tl.float32)
    for turn in range(turns):
        at = turn * BLOCK + k
        largest = tl.maximum(
            largest, tl.abs(tl.load(x_ptr + m * stride_x + at, mask=at < columns, other=0.0).to(tl.float32))
        )
    scale = tl.max(largest, axis=0) / 127.0
    tl.store(scales_ptr + m, scale)
    inverse = tl.where(scale > 0.0, 1.0 / scale, 0.0)
    for turn in range(turns):
        at = turn * BLOCK + k
        source = at // 16 * 16 + at % 4 // 2 * 8 + at % 16 // 4 * 2 + at % 2
        x = tl.load(x_ptr + m * stride_x + source, mask=source < columns, other=0.0).to(tl.float32) * inverse
        rounded = tl.floor(tl.minimum(tl.maximum(x, -127.0), 127.0) + 0.5)
        tl.store(out_ptr + m * padded_columns + at, rounded.to(tl.int8), mask=at < padded_columns)


@triton.jit(do_not_specialize=["tokens"])
def gemm_int8_kernel(
    x_ptr, x_scales_ptr, out_ptr, bias_ptr, residual_ptr,
    a_ptr, b_ptr, c_ptr, scales_ptr, factors_ptr,
    tokens, out_rows, row_tiles, stride_out, stride_residual, padded_columns, padded_blocks, blocks, turns, multiplier,
    BITS: tl.constexpr, BLOCK: tl.constexpr, DOUBLE: tl.constexpr, TILES: tl.constexpr, BM: tl.constexpr,
    COLUMNS: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(N' / (16 TILES)) * ceil(M / BM),)."""
    BN: tl.constexpr = TILES * 16
    LOW_BIT: tl.constexpr = COLUMNS if BLOCK == 0 else BLOCK & -BLOCK
    SUB: tl.constexpr = LOW_BIT if LOW_BIT < COLUMNS else COLUMNS
    PARTS: tl.constexpr = COLUMNS // SUB
    row_blocks = tl.cdiv(row_tiles, TILES)
    pid_n = tl.program_id(0) % row_blocks
    pid_m = tl.program_id(0) // row_blocks
    m = pid_m * BM + tl.arange(0, BM)
    x_row = tl.minimum(m, tokens - 1)
    tile = tl.minimum(pid_n * TILES + tl.arange(0, TILES), row_tiles - 1)
    row = tl.arange(0, 16)[None, :]
    k = tl.arange(0, SUB)
    acc = tl.zeros((BN, BM), tl.float32)
    for chunk in tl.range(turns, num_stages=STAGES):
        a, b, c = load_planes(a_ptr, b_ptr, c_ptr, tile, chunk, padded_columns, BITS, COLUMNS)
        weights = decode_int8(a, b, c, BITS, COLUMNS // 16)
        for i in tl.static_range(PARTS):
            x = tl.load(x_ptr + (x_row[:, None] * padded_columns + chunk * COLUMNS + i * SUB + k[None, :]))
            w = tl.reshape(operand(part(weights, i, PARTS), True), (BN, SUB))
            products = tl.dot(w, tl.trans(x), out_dtype=tl.int32)
            scale = load_scale(
                scales_ptr, factors_ptr, chunk, tile[:, None], tile[:, None], row, padded_blocks, blocks,
                i * SUB, COLUMNS, BLOCK, DOUBLE,
            )  # fmt: skip
            acc += products.to(tl.float32) * tl.reshape(scale, (BN,))[:, None]
    rows = pid_n * BN + tl.arange(0, BN)[:, None]
    seen = (rows < out_rows) & (m[None, :] < tokens)
    acc *= (tl.load(x_scales_ptr + x_row) * multiplier)[None, :]
    if BIAS:
        acc += tl.load(bias_ptr + rows, mask=rows < out_rows, other=0.0).to(tl.float32)
    if RESIDUAL:
        acc += tl.load(residual_ptr + m[None, :] * stride_residual + rows, mask=seen, other=0.0).to(tl.float32)
    tl.store(out_ptr + m[None, :] * stride_out + rows, acc.to(out_ptr.dtype.element_ty), mask=seen)


def quantize_tokens(x: torch.Tensor, padded_columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Round each token to int8.

    Args:
        x: (M, K), contiguous rows.
        padded_columns: K', a multiple of 16 from K.

    Returns:
        int8 (M, K'), 16 columns in the order (t, k8, k0) of codes.operand, zeros beyond K; float32 (M,) scales.
    """
    tokens, columns = x.shape
    out = torch.empty((tokens, padded_columns), dtype=torch.int8, device=x.device)
    scales = torch.empty((tokens,), dtype=torch.float32, device=x.device)
    block = min(2048, triton.next_power_of_2(padded_columns))
    quantize_tokens_kernel[(tokens,)](
        x,
        out,
        scales,
        columns,
        padded_columns,
        x.stride(0),
        triton.cdiv(padded_columns, block),
        BLOCK=block,
        num_warps=4,
    )
    return out, scales


def supports_int8(weight: TritonWeight) -> bool:
    """Whether gemm_int8 runs a weight: symmetric integer codes in blocks of 32 or more (an int8 product's columns)."""
    block = weight.block_size & -weight.block_size
    return weight.dense is None and weight.kind == "int" and weight.offsets is None and (block == 0 or block >= 32)


def gemm_int8(
    x: torch.Tensor,
    weight: TritonWeight,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    *,
    config: GemmConfig | None = None,
) -> torch.Tensor:
    """x W^T (+ bias) (+ residual) with x rounded to int8 per token.

    Args:
        x: (M, K), M >= 1, the dtype the weight was prepared for, contiguous rows.
        weight: (N, K), see supports_int8.
        bias: (N,) or None, any float dtype.
        residual: (M, N) or None, any float dtype.
        out_dtype: of the result; x's by default.
        config: block sizes (split is ignored); chosen for the GPU by default.

    Returns:
        (M, N).

    Raises:
        UnsupportedError: the arguments do not fit together, or the format is not a symmetric integer one.
    """
    check_product(x, weight, bias, residual)
    if not supports_int8(weight):
        raise UnsupportedError(
            f"int8 activations need a symmetric integer format with blocks divisible by 32, not {weight.format}"
        )
    tokens, rows = x.shape[0], weight.shape[0]
    config = config or gemm_int8_config(current_arch(), problem_of(x, weight))
    padded_rows, padded_columns = weight.padded
    row_tiles = padded_rows // ROW_TILE
    values, scales = quantize_tokens(x, padded_columns)
    out = torch.empty((tokens, rows), dtype=out_dtype or x.dtype, device=x.device)
    if tokens > (most := tokens_per_launch(config, values, residual, out)):
        raise UnsupportedError(f"gemm_int8 takes at most {most} tokens of such a product, not {tokens}")
    gemm_int8_kernel[(triton.cdiv(row_tiles, config.tiles) * triton.cdiv(tokens, config.tokens),)](
        values, scales, out, out if bias is None else bias, out if residual is None else residual,
        *weight_pointers(weight)[:5],
        tokens, rows, row_tiles, rows, 0 if residual is None else residual.stride(0), padded_columns,
        weight.padded_blocks, weight.blocks, padded_columns // config.columns, weight.multiplier,
        BITS=weight.bits, BLOCK=weight.block_size, DOUBLE=weight.scales_super is not None,
        TILES=config.tiles, BM=config.tokens, COLUMNS=config.columns,
        BIAS=bias is not None, RESIDUAL=residual is not None, STAGES=config.stages,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return out
