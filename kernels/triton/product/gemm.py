"""x W^T for many tokens (M = 5 and up): tiles of rows and tokens on the tensor cores.

Shapes: x (M, K), W (N, K) prepared by `layout.prepare_weight`, out (M, N). The product is computed transposed, W x^T:
W's fragments are decoded in the registers of the lanes that loaded them (mma.m16n8k16, or wgmma with its left operand
in registers) and x^T comes from shared memory, loaded ahead of its use by the pipeliner (`stages`).

A program owns TILES x 16 rows and BM tokens. With few tokens the columns are split over several programs, which write
float32 partial sums that a second kernel adds in a fixed order: results do not depend on timing.

Where BM is at most 64 the scales multiply the products of a block, in float32: codes of integer formats are then exact
factors. Above, that would cost more than decoding, so weights are scaled in float32 and rounded once to x's type, like
a dequantized weight, after a shift of the exponent (`lift`) that keeps half precision in its normal range.

The same kernel multiplies groups of tokens with weights of their own (mixture of experts, `grouped.py`): experts are
stacked along the row tiles, and a program looks up which expert its tokens belong to.

Roofline: memory bandwidth for the codes up to about 64 tokens, tensor cores above.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kbit.host.errors import UnsupportedError
from kbit.kernels.triton.codecs.codes import (
    load_scale,
    load_table,
    operand,
    part,
    swapped,
)
from kbit.kernels.triton.codecs.layout import ROW_TILE, TritonWeight
from kbit.kernels.triton.codecs.values import load_values
from kbit.kernels.triton.product.configs import GemmConfig, gemm_config
from kbit.kernels.triton.product.gemv import (
    add_shares,
    check_product,
    dot_precision,
    magic_number,
    problem_of,
    swaps,
    weight_tuple,
)
from kbit.kernels.triton.rows.activate import act
from kbit.kernels.triton.target import current_arch

# Up to here scales multiply sums, above weights: per 64 columns a lane has BM / 2 sums and 32 weights to scale, and a
# weight costs two conversions besides the product.
SCALED_SUMS = 64

# Offsets of activations and results are 32 bits wide: a launch has no more elements of either.
MOST_ELEMENTS = 2**31 - 1


@triton.jit(do_not_specialize=["tokens"])  # only compared with, and different in every pass
def gemm_kernel(
    x_ptr, out_ptr, bias_ptr, residual_ptr, gate_ptr, order_ptr, expert_ptr, weight,
    tokens, out_rows, columns, row_tiles, stride_x, stride_out, stride_residual, stride_gate,
    padded_columns, padded_blocks, blocks, factors, turns, magic, multiplier, lift,
    BITS: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr, DOUBLE: tl.constexpr, OFFSETS: tl.constexpr,
    TILES: tl.constexpr, BM: tl.constexpr, COLUMNS: tl.constexpr, SPLIT: tl.constexpr, EVEN: tl.constexpr,
    SCALE_SUMS: tl.constexpr, SWAP: tl.constexpr, PRECISION: tl.constexpr, GATE: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, GROUPED: tl.constexpr, TOP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(N' / (16 TILES)) * token tiles, SPLIT).

    With GROUPED a token tile's entries of `order` are its rows of out (a row >= tokens is padding), row / TOP is the
    row of x, and `expert` says whose weight; the kernel ends at a tile of expert -1.
    """
    planes, scales_ptr, factors_ptr, offsets_ptr, offset_factors_ptr, table_ptr = weight
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    BN: tl.constexpr = TILES * 16
    LOW_BIT: tl.constexpr = COLUMNS if BLOCK == 0 else BLOCK & -BLOCK
    SUB: tl.constexpr = LOW_BIT if LOW_BIT < COLUMNS else COLUMNS
    PARTS: tl.constexpr = COLUMNS // SUB
    # Row tiles fastest: programs that run together share their tokens' activations in the L2 cache.
    row_blocks = tl.cdiv(row_tiles, TILES)
    pid_n = tl.program_id(0) % row_blocks
    pid_m = tl.program_id(0) // row_blocks
    share = tl.program_id(1)
    m = pid_m * BM + tl.arange(0, BM)
    expert_tiles = 0
    if GROUPED:
        expert = tl.load(expert_ptr + pid_m)
        if expert < 0:
            return
        expert_tiles = expert * row_tiles
        factors_ptr += expert * factors
        offset_factors_ptr += expert * factors
        m = tl.load(order_ptr + m)
    seen_m = m < tokens
    x_row = tl.where(seen_m, m // TOP, 0)
    # Beyond the last row tile the last one is read again; its results are not stored.
    own_tile = tl.minimum(pid_n * TILES + tl.arange(0, TILES), row_tiles - 1)
    tile = expert_tiles + own_tile
    row = tl.arange(0, 16)[None, :]
    k = tl.arange(0, SUB)
    values = load_table(table_ptr, KIND, BITS)
    acc = tl.zeros((BN, BM), tl.float32)
    for turn in tl.range(turns, num_stages=STAGES):
        chunk = turn * SPLIT + share
        weights = load_values(planes, tile, chunk, padded_columns, values, magic, BITS, KIND, COLUMNS, DTYPE)
        for i in tl.static_range(PARTS):
            column = chunk * COLUMNS + i * SUB
            at = x_ptr + (x_row[:, None] * stride_x + column + k[None, :])
            if EVEN:  # noqa: SIM108
                x = tl.load(at)
            else:
                x = tl.load(at, mask=(column + k[None, :] < columns) & seen_m[:, None], other=0.0)
            if SWAP:
                x = tl.reshape(swapped(x[None, :, :]), (BM, SUB))
            x = tl.trans(x)
            w = operand(part(weights, i, PARTS), SWAP)  # (TILES, 16, SUB)
            scale = load_scale(
                scales_ptr, factors_ptr, chunk, tile[:, None], own_tile[:, None], row, padded_blocks, blocks,
                i * SUB, COLUMNS, BLOCK, DOUBLE,
            ) * multiplier  # fmt: skip
            if OFFSETS:
                offset = load_scale(
                    offsets_ptr, offset_factors_ptr, chunk, tile[:, None], own_tile[:, None], row, padded_blocks,
                    blocks, i * SUB, COLUMNS, BLOCK, DOUBLE,
                )  # fmt: skip
                if KIND == "int":  # the levels lie half a step beside the integers
                    offset += 0.5 * scale
            if SCALE_SUMS:
                products = tl.dot(tl.reshape(w, (BN, SUB)), x, input_precision=PRECISION)
                acc += products * tl.reshape(scale, (BN,))[:, None]
                if OFFSETS:
                    ones = tl.full((BN, SUB), 1.0, tl.float32).to(DTYPE)
                    acc += tl.dot(ones, x, input_precision=PRECISION) * tl.reshape(offset, (BN,))[:, None]
            else:
                w = w.to(tl.float32) * (scale * lift)[:, :, None]
                if OFFSETS:
                    w += (offset * lift)[:, :, None]
                acc = tl.dot(tl.reshape(w.to(DTYPE), (BN, SUB)), x, acc, input_precision=PRECISION)
    if not SCALE_SUMS:
        acc = acc / lift
    rows = pid_n * BN + tl.arange(0, BN)[:, None]
    m = m[None, :]
    seen = (rows < out_rows) & (m < tokens)
    if SPLIT > 1:
        tl.store(out_ptr + (share * tokens + m) * stride_out + rows, acc, mask=seen)
    else:
        if GATE != "":
            acc *= act(tl.load(gate_ptr + m * stride_gate + rows, mask=seen, other=0.0).to(tl.float32), GATE)
        if BIAS:
            acc += tl.load(bias_ptr + rows, mask=rows < out_rows, other=0.0).to(tl.float32)
        if RESIDUAL:
            acc += tl.load(residual_ptr + m * stride_residual + rows, mask=seen, other=0.0).to(tl.float32)
        tl.store(out_ptr + m * stride_out + rows, acc.to(out_ptr.dtype.element_ty), mask=seen)


def gemm(
    x: torch.Tensor,
    weight: TritonWeight,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    *,
    gate: torch.Tensor | None = None,
    kind: str = "",
    config: GemmConfig | None = None,
) -> torch.Tensor:
    """x W^T (+ bias) (+ residual); or act(gate) * (x W^T) (+ bias) (+ residual).

    Args:
        x: (M, K), the dtype the weight was prepared for, contiguous rows.
        weight: (N, K), quantized.
        bias: (N,) or None, any float dtype.
        residual: (M, N) or None, any float dtype.
        out_dtype: of the result; x's by default.
        gate: (M, N) or None: the gate's product, before its activation.
        kind: the activation, "silu", "gelu", "gelu_tanh" or "relu".
        config: block sizes; chosen for the GPU by default.

    Returns:
        (M, N).

    Raises:
        UnsupportedError: the arguments do not fit together.
    """
    check_product(x, weight, bias, residual, kind=kind, gate=gate)
    tokens, rows = x.shape[0], weight.shape[0]
    config = config or gemm_config(current_arch(), problem_of(x, weight, gated=gate is not None))
    if gate is not None and config.split > 1:
        config = GemmConfig(config.tiles, config.tokens, config.columns, 1, config.warps, config.stages)
    out = torch.empty((tokens, rows), dtype=out_dtype or x.dtype, device=x.device)
    most = tokens_per_launch(config, x, residual, gate, out)
    if tokens <= most:
        _product(x, weight, out, config, bias, residual, gate, kind)
        return out
    for start in range(0, tokens, most):
        part = slice(start, start + most)
        others = (None if residual is None else residual[part], None if gate is None else gate[part])
        _product(x[part], weight, out[part], config, bias, *others, kind)
    return out


def tokens_per_launch(config: GemmConfig, *matrices: torch.Tensor | None) -> int:
    """How many rows of these matrices a launch may take, whole tiles of a program."""
    widest = max(matrix.stride(0) for matrix in matrices if matrix is not None)
    return max(1, MOST_ELEMENTS // (config.split * max(1, widest) * config.tokens)) * config.tokens


def _product(
    x: torch.Tensor,
    weight: TritonWeight,
    out: torch.Tensor,
    config: GemmConfig,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    gate: torch.Tensor | None,
    kind: str,
) -> None:
    """One launch, and the sum of its shares."""
    tokens, rows = out.shape
    target = out
    if config.split > 1:
        target = torch.empty((config.split, tokens, rows), dtype=torch.float32, device=x.device)
    launch(x, weight, target, config, triton.cdiv(tokens, config.tokens), tokens, rows, bias, residual, gate, kind)
    if config.split > 1:
        add_shares(target, out, config.split, bias, residual, "")


def launch(
    x: torch.Tensor,
    weight: TritonWeight,
    out: torch.Tensor,
    config: GemmConfig,
    token_tiles: int,
    tokens: int,
    stride_out: int,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    kind: str = "",
    order: torch.Tensor | None = None,
    experts: torch.Tensor | None = None,
    top: int = 1,
) -> None:
    """Launch gemm_kernel; arguments as its, checked by the caller."""
    arch = current_arch()
    rows, columns = weight.shape
    padded_rows, padded_columns = weight.padded
    row_tiles = padded_rows // ROW_TILE
    chunks = padded_columns // config.columns
    if chunks % config.split:
        raise UnsupportedError(f"{chunks} chunks of columns cannot be split {config.split} ways: choose a divisor")
    even = order is None and columns == padded_columns and tokens % config.tokens == 0
    # wgmma (sm_90) and tcgen05 (sm_100), used from 64 rows, take two neighbouring columns per lane; see codes.operand.
    warp_groups = arch in ("sm_90", "sm_100") and config.tiles >= 4 and config.warps >= 4
    swap = swaps(weight, arch) and not warp_groups
    factors = 0 if weight.scales_super is None else weight.scales_super.shape[-1]
    gemm_kernel[(triton.cdiv(row_tiles, config.tiles) * token_tiles, config.split)](
        x, out, out if bias is None else bias, out if residual is None else residual, out if gate is None else gate,
        out if order is None else order, out if experts is None else experts, weight_tuple(weight),
        tokens, rows, columns, row_tiles, x.stride(0), stride_out, 0 if residual is None else residual.stride(0),
        0 if gate is None else gate.stride(0), padded_columns, weight.padded_blocks, weight.blocks, factors,
        chunks // config.split, magic_number(weight), weight.multiplier, weight.lift,
        BITS=weight.bits, KIND=weight.kind, BLOCK=weight.block_size,
        DOUBLE=weight.scales_super is not None, OFFSETS=weight.offsets is not None,
        TILES=config.tiles, BM=config.tokens, COLUMNS=config.columns, SPLIT=config.split, EVEN=even,
        SCALE_SUMS=config.tokens <= SCALED_SUMS, SWAP=swap, PRECISION=dot_precision(x.dtype, arch),
        GATE="" if gate is None else kind, BIAS=bias is not None, RESIDUAL=residual is not None,
        GROUPED=order is not None, TOP=top, STAGES=config.stages,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
