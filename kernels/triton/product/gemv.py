"""x W^T for few tokens (M = 1..8): reads the codes once, at the speed of memory.

Shapes: x (M, K), W (N, K) prepared by `layout.prepare_weight`, out (M, N).

A program owns 16 rows of W, one tile of mma.m16n8k16; its warps share the columns, each taking chunks of 64 to 256
columns in turn: it loads a chunk's codes 128 bits per lane (evict-first: nothing reads them again), decodes them in
its registers (`codes`), multiplies them with the tokens' activations on the tensor cores, which also sum over the
columns, and adds the products times the blocks' scales in float32. The tensor cores make the multiplication nearly free
(1/8 instruction per weight) and serve up to 8 tokens for the price of one. At the end the warps' sums are added in
shared memory, and bias, residual or the activation of a gated pair follow in the same kernel. Nothing is added
atomically: a result does not depend on timing. If N is too small to fill the GPU, several programs share a tile's
columns and write float32 partial sums, which a second kernel adds in a fixed order.

The scale multiplies sums, not weights: codes of integer formats are exact in half precision, so such a product has the
rounding of a float32 sum only; a table's entries are rounded once to x's type.

Roofline: memory bandwidth; N K bits / 8 bytes of codes plus scales.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from kbit.host.errors import UnsupportedError
from kbit.kernels.triton.codecs.codes import (
    MAGIC_BF16,
    MAGIC_FP16,
    load_scale,
    load_table,
    operand,
    part,
    swapped,
)
from kbit.kernels.triton.codecs.layout import ROW_TILE, TritonWeight
from kbit.kernels.triton.codecs.values import load_values
from kbit.kernels.triton.product.configs import GemvConfig, Problem, gemv_config
from kbit.kernels.triton.rows.activate import act
from kbit.kernels.triton.target import current_arch

# Triton 3.7 lets a join behind a gather decide the operand's layout, 3.8 and 3.9 do not.
_JOIN_BEHIND_GATHER = tuple(int(number) for number in triton.__version__.split(".")[:2]) < (3, 8)

MAX_TOKENS = 8  # columns of the accumulator of mma.m16n8k16
GATES = ("silu", "gelu", "gelu_tanh", "relu")


@triton.jit
def gemv_sums(
    x_ptr, weight, tile, share, tokens, columns, stride_x, padded_columns, padded_blocks, blocks, turns, magic,
    multiplier,
    BITS: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr, DOUBLE: tl.constexpr, OFFSETS: tl.constexpr,
    BM: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr, SPLIT: tl.constexpr, EVEN: tl.constexpr,
    SWAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums of one row tile over the columns of one program: float32 (16, BM)."""
    planes, scales_ptr, factors_ptr, offsets_ptr, offset_factors_ptr, table_ptr = weight
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    # Columns that surely share a scale: the power of two in the block size, at most a chunk.
    LOW_BIT: tl.constexpr = COLUMNS if BLOCK == 0 else BLOCK & -BLOCK
    SUB: tl.constexpr = LOW_BIT if LOW_BIT < COLUMNS else COLUMNS
    PARTS: tl.constexpr = COLUMNS // SUB
    warp = tl.arange(0, WARPS)
    row = tl.arange(0, 16)[None, :]
    m = tl.arange(0, BM)
    k = tl.arange(0, SUB)
    chunks = padded_columns // COLUMNS
    values = load_table(table_ptr, KIND, BITS)
    acc = tl.zeros((WARPS, 16, BM), tl.float32)
    for turn in range(turns):
        chunk = (turn * SPLIT + share) * WARPS + warp
        column = chunk * COLUMNS
        if not EVEN:  # the last turn's idle warps decode the last chunk again, times activations of zero
            chunk = tl.minimum(chunk, chunks - 1)
        weights = load_values(planes, tile, chunk, padded_columns, values, magic, BITS, KIND, COLUMNS, DTYPE)
        at = x_ptr + (m[None, :, None] * stride_x + column[:, None, None] + k[None, None, :])
        for i in tl.static_range(PARTS):
            if EVEN:
                x = tl.load(at + i * SUB)
            else:
                seen = ((column + i * SUB)[:, None, None] + k[None, None, :] < columns) & (m[None, :, None] < tokens)
                x = tl.load(at + i * SUB, mask=seen, other=0.0)
            if SWAP:
                x = swapped(x)
            x = tl.permute(x, (0, 2, 1))
            products = tl.dot(operand(part(weights, i, PARTS), SWAP), x, input_precision=PRECISION)
            scale = load_scale(
                scales_ptr, factors_ptr, chunk[:, None], tile, tile, row, padded_blocks, blocks,
                i * SUB, COLUMNS, BLOCK, DOUBLE,
            )  # (WARPS, 16)  # fmt: skip
            acc += products * scale[:, :, None]
            if OFFSETS:
                offset = load_scale(
                    offsets_ptr, offset_factors_ptr, chunk[:, None], tile, tile, row, padded_blocks, blocks,
                    i * SUB, COLUMNS, BLOCK, DOUBLE,
                ) / multiplier  # fmt: skip
                if KIND == "int":  # the levels lie half a step beside the integers
                    offset += 0.5 * scale
                ones = tl.full((WARPS, 16, SUB), 1.0, tl.float32).to(DTYPE)
                acc += tl.dot(ones, x, input_precision=PRECISION) * offset[:, :, None]
    return tl.sum(acc, axis=0) * multiplier


@triton.jit
def gemv_kernel(
    x_ptr, out_ptr, bias_ptr, residual_ptr, weight, up_weight,
    tokens, out_rows, columns, stride_x, stride_out, stride_residual, padded_columns, padded_blocks, blocks, turns,
    magic, multiplier, up_multiplier,
    BITS: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr, DOUBLE: tl.constexpr, OFFSETS: tl.constexpr,
    BM: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr, SPLIT: tl.constexpr, EVEN: tl.constexpr,
    SWAP: tl.constexpr, PRECISION: tl.constexpr, GATE: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Grid (N' / 16, SPLIT). With GATE `up_weight` is a second matrix of the same format and shape."""
    tile = tl.program_id(0)
    share = tl.program_id(1)
    sums = gemv_sums(
        x_ptr, weight, tile, share, tokens, columns, stride_x, padded_columns, padded_blocks, blocks, turns, magic,
        multiplier,
        BITS, KIND, BLOCK, DOUBLE, OFFSETS, BM, COLUMNS, WARPS, SPLIT, EVEN, SWAP, PRECISION,
    )  # fmt: skip
    rows = tile * 16 + tl.arange(0, 16)[:, None]
    m = tl.arange(0, BM)[None, :]
    seen = (rows < out_rows) & (m < tokens)
    if GATE != "":
        up = gemv_sums(
            x_ptr, up_weight, tile, share, tokens, columns, stride_x, padded_columns, padded_blocks, blocks, turns,
            magic, up_multiplier,
            BITS, KIND, BLOCK, DOUBLE, OFFSETS, BM, COLUMNS, WARPS, SPLIT, EVEN, SWAP, PRECISION,
        )  # fmt: skip
        if SPLIT == 1:
            sums = act(sums, GATE) * up
        else:  # partial sums of `up` follow those of the gate
            tl.store(out_ptr + ((SPLIT + share) * tokens + m) * stride_out + rows, up, mask=seen)
    if SPLIT > 1:
        tl.store(out_ptr + (share * tokens + m) * stride_out + rows, sums, mask=seen)
    else:
        if BIAS:
            sums += tl.load(bias_ptr + rows, mask=rows < out_rows, other=0.0).to(tl.float32)
        if RESIDUAL:
            sums += tl.load(residual_ptr + m * stride_residual + rows, mask=seen, other=0.0).to(tl.float32)
        tl.store(out_ptr + m * stride_out + rows, sums.to(out_ptr.dtype.element_ty), mask=seen)


@triton.jit
def add_shares_kernel(
    partial_ptr, out_ptr, bias_ptr, residual_ptr, tokens, out_rows, stride_out, stride_residual,
    SPLIT: tl.constexpr, GATE: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds partial sums (SPLIT, M, N), or (2, SPLIT, M, N) with GATE, in order. Grid (M, ceil(N / BLOCK_N))."""
    m = tl.program_id(0)
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    seen = rows < out_rows
    sums = tl.zeros((BLOCK_N,), tl.float32)
    up = tl.zeros((BLOCK_N,), tl.float32)
    for share in tl.static_range(SPLIT):
        sums += tl.load(partial_ptr + (share * tokens + m) * out_rows + rows, mask=seen, other=0.0)
        if GATE != "":
            up += tl.load(partial_ptr + ((SPLIT + share) * tokens + m) * out_rows + rows, mask=seen, other=0.0)
    if GATE != "":
        sums = act(sums, GATE) * up
    if BIAS:
        sums += tl.load(bias_ptr + rows, mask=seen, other=0.0).to(tl.float32)
    if RESIDUAL:
        sums += tl.load(residual_ptr + m * stride_residual + rows, mask=seen, other=0.0).to(tl.float32)
    tl.store(out_ptr + m * stride_out + rows, sums.to(out_ptr.dtype.element_ty), mask=seen)


def check_product(
    x: torch.Tensor,
    weight: TritonWeight,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    up: TritonWeight | None = None,
    kind: str = "",
    gate: torch.Tensor | None = None,
) -> None:
    """Whether shapes, types and layouts fit together.

    Raises:
        UnsupportedError: they do not; the message names both sides.
    """
    rows, columns = weight.shape
    if x.ndim != 2 or x.shape[1] != columns:
        raise UnsupportedError(f"x {tuple(x.shape)} does not match a weight of (N, K) = {weight.shape}")
    if x.dtype != weight.dtype:
        raise UnsupportedError(f"the weight was prepared for {weight.dtype} activations, x is {x.dtype}")
    if x.stride(1) != 1:
        raise UnsupportedError(f"x must have contiguous rows, its strides are {x.stride()}")
    if bias is not None and (bias.shape != (rows,) or not bias.is_contiguous()):
        raise UnsupportedError(f"bias must be contiguous ({rows},), not {tuple(bias.shape)}")
    if residual is not None and (residual.shape != (x.shape[0], rows) or residual.stride(1) != 1):
        raise UnsupportedError(f"residual must be ({x.shape[0]}, {rows}) with contiguous rows")
    if up is not None:
        if (up.format, up.shape, up.dtype, up.kind) != (weight.format, weight.shape, weight.dtype, weight.kind):
            raise UnsupportedError(f"gate is {weight.format} {weight.shape}, up is {up.format} {up.shape}: not alike")
        if kind not in GATES:
            raise UnsupportedError(f"activation {kind!r} is not one of {', '.join(GATES)}")
    if gate is not None and (gate.shape != (x.shape[0], rows) or gate.stride(1) != 1 or kind not in GATES):
        raise UnsupportedError(
            f"gate must be ({x.shape[0]}, {rows}) with contiguous rows, its activation one of {GATES}"
        )


def weight_tuple(weight: TritonWeight) -> tuple[Any, ...]:
    """A weight as kernels take it, in one argument: planes, scales, their factors, offsets, their factors, table.

    What a format does not have repeats the first plane: of planes there are three, or as many as a nested weight has.
    """
    first = weight.planes[0]
    planes = (*weight.planes, *(first,) * (3 - len(weight.planes)))
    several = (weight.scales, weight.scales_super, weight.offsets, weight.offsets_super, weight.table)
    return planes, *(first if tensor is None else tensor for tensor in several)


def magic_number(weight: TritonWeight) -> int:
    """See codes.decode."""
    return MAGIC_BF16 if weight.dtype == torch.bfloat16 and weight.bits < 8 else MAGIC_FP16


def dot_precision(dtype: torch.dtype, arch: str) -> str:
    """How float32 operands are multiplied: in three TF32 products on NVIDIA's, which keeps float32's accuracy."""
    return "tf32x3" if dtype == torch.float32 and arch.startswith("sm_") else "ieee"


def swaps(weight: TritonWeight, arch: str) -> bool:
    """Whether mma's operand has four neighbouring columns per lane; see codes.operand.

    Any answer gives the same result; the wrong one costs 64 shuffles per 128 weights of a lane. AMD's operands differ
    from both.
    """
    joined = weight.kind == "int" or (weight.kind.endswith("pairs") and _JOIN_BEHIND_GATHER)
    return joined and not arch.startswith("gfx")


def problem_of(x: torch.Tensor, weight: TritonWeight, *, gated: bool = False) -> Problem:
    """What configurations depend on."""
    return Problem(
        x.shape[0], *weight.padded, weight.bits, weight.block_size, x.element_size(), weight.format, gated
    )  # fmt: skip


def add_shares(
    partial: torch.Tensor,
    out: torch.Tensor,
    split: int,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    kind: str,
) -> None:
    """Launch add_shares_kernel: partial float32 (split or 2 split, M, N) -> out (M, N)."""
    tokens, rows = out.shape
    block = 256
    add_shares_kernel[(tokens, triton.cdiv(rows, block))](
        partial, out, out if bias is None else bias, out if residual is None else residual,
        tokens, rows, out.stride(0), 0 if residual is None else residual.stride(0),
        SPLIT=split, GATE=kind, BIAS=bias is not None, RESIDUAL=residual is not None, BLOCK_N=block,
    )  # fmt: skip


def gemv(
    x: torch.Tensor,
    weight: TritonWeight,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    *,
    up: TritonWeight | None = None,
    kind: str = "",
    config: GemvConfig | None = None,
) -> torch.Tensor:
    """x W^T (+ bias) (+ residual); or act(x W^T) * (x U^T) (+ bias) (+ residual) where `up` is given.

    Args:
        x: (M, K), M = 1..8, the dtype the weight was prepared for, contiguous rows.
        weight: (N, K), quantized.
        bias: (N,) or None, any float dtype.
        residual: (M, N) or None, any float dtype.
        out_dtype: of the result; x's by default.
        up: a second weight of the same format and shape.
        kind: activation of the gate: "silu", "gelu", "gelu_tanh" or "relu".
        config: block sizes; chosen for the GPU by default.

    Returns:
        (M, N).

    Raises:
        UnsupportedError: the arguments do not fit together, or M > 8.
    """
    check_product(x, weight, bias, residual, up, kind)
    tokens, columns = x.shape
    rows = weight.shape[0]
    if not 1 <= tokens <= MAX_TOKENS:
        raise UnsupportedError(f"gemv takes 1 to {MAX_TOKENS} tokens, not {tokens}")
    arch = current_arch()
    config = config or gemv_config(arch, problem_of(x, weight, gated=up is not None))
    out = torch.empty((tokens, rows), dtype=out_dtype or x.dtype, device=x.device)
    target = out
    if config.split > 1:
        shares = config.split * (1 if up is None else 2)
        target = torch.empty((shares, tokens, rows), dtype=torch.float32, device=x.device)
    padded_rows, padded_columns = weight.padded
    chunks = padded_columns // config.columns
    turns = triton.cdiv(chunks, config.warps * config.split)
    # AMD's matrix instructions have no tile narrower than 16; with less, Triton would multiply without them.
    block_tokens = 16 if arch.startswith("gfx") else triton.next_power_of_2(tokens)
    even = columns == padded_columns and chunks == turns * config.warps * config.split and tokens == block_tokens
    second = weight if up is None else up
    gemv_kernel[(padded_rows // ROW_TILE, config.split)](
        x, target, out if bias is None else bias, out if residual is None else residual,
        weight_tuple(weight), weight_tuple(second),
        tokens, rows, columns, x.stride(0), rows, 0 if residual is None else residual.stride(0),
        padded_columns, weight.padded_blocks, weight.blocks, turns,
        magic_number(weight), weight.multiplier, second.multiplier,
        BITS=weight.bits, KIND=weight.kind, BLOCK=weight.block_size,
        DOUBLE=weight.scales_super is not None, OFFSETS=weight.offsets is not None,
        BM=block_tokens, COLUMNS=config.columns, WARPS=config.warps, SPLIT=config.split, EVEN=even,
        SWAP=swaps(weight, arch), PRECISION=dot_precision(x.dtype, arch), GATE="" if up is None else kind,
        BIAS=bias is not None, RESIDUAL=residual is not None,
        num_warps=config.warps, num_stages=1,
    )  # fmt: skip
    if config.split > 1:
        add_shares(target, out, config.split, bias, residual, "" if up is None else kind)
    return out
