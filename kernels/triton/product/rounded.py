"""x W^T with activations rounded to 8 bits: the kernel, and what a weight must be for it.

Shapes: x (M, K), W (N, K) prepared by `layout.prepare_weight` and marked by `with_activations`, out (M, N).

Rounding costs accuracy, so none of this is ever chosen by itself: a caller marks the weights whose products with more
than ROUNDED_TOKENS tokens shall round, and `matmul` follows the mark. Two kernels run: one rounds the tokens and writes
them in the order of columns in which `codes8` decodes W; one multiplies. In that one a program owns TILES x 16 rows and
BM tokens, as in gemm: W's operands are decoded in the registers of the lanes that loaded the codes, x's come from
shared memory. The products of a segment of columns (those that share a scale of W, 128 at most) are summed by the
tensor cores, exactly in int32 or in float32, and added to a float32 sum times the segment's scales. What that takes per
sum and segment decides the speed, not the decoding: three instructions for int8 (conversion, scale of the token's
segment, scale of the weight's block), one for fp8, whose tokens have one scale each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from kbit.host.errors import UnsupportedError
from kbit.kernels.triton.codecs.codes import load_planes, load_scale, load_table
from kbit.kernels.triton.codecs.codes8 import (
    bytes_operand,
    fp8_words,
    int8_words,
    order_of,
    run,
    table_bytes,
    words_operand,
)
from kbit.kernels.triton.codecs.layout import TritonWeight
from kbit.kernels.triton.rows.activate import act

KINDS = ("int8", "fp8")
MOST_SEGMENT = 128
# e4m3 in OCP's sense (finite, largest 448), which CDNA 3's differs from.
FP8_ARCHES = ("sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "sm_121", "interpreter")


@dataclass(frozen=True, eq=False)
class RoundedTokens:
    """Activations as a rounded product reads them.

    Attributes:
        values: int8 or float8_e4m3fn (M, K'), columns reordered in groups (`codes8.order_of`), zeros beyond K.
        scales: float32 (segments, M); or (1, M) where a token has one scale.
        layout: what two weights must have in common to share them: kind, K', segment, order.
    """

    values: torch.Tensor
    scales: torch.Tensor
    layout: tuple[str, int, int, int]


@triton.jit(do_not_specialize=["tokens"])
def gemm_rounded_kernel(
    x_ptr, x_scales_ptr, out_ptr, bias_ptr, residual_ptr, gate_ptr, weight,
    tokens, out_rows, row_tiles, stride_out, stride_residual, stride_gate, padded_columns, padded_blocks, blocks, turns,
    signs, multiplier,
    FP8: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr, DOUBLE: tl.constexpr,
    TILES: tl.constexpr, BM: tl.constexpr, COLUMNS: tl.constexpr, SEGMENT: tl.constexpr, GATE: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(N' / (16 TILES)) * ceil(M / BM),)."""
    a_ptr, b_ptr, c_ptr, scales_ptr, factors_ptr, table_ptr = weight
    BN: tl.constexpr = TILES * 16
    PARTS: tl.constexpr = COLUMNS // SEGMENT
    row_blocks = tl.cdiv(row_tiles, TILES)
    pid_n = tl.program_id(0) % row_blocks
    pid_m = tl.program_id(0) // row_blocks
    m = pid_m * BM + tl.arange(0, BM)
    x_row = tl.minimum(m, tokens - 1)
    tile = tl.minimum(pid_n * TILES + tl.arange(0, TILES), row_tiles - 1)
    row = tl.arange(0, 16)[None, :]
    k = tl.arange(0, SEGMENT)
    values = load_table(table_ptr, KIND, BITS)
    acc = tl.zeros((BN, BM), tl.float32)
    for chunk in tl.range(turns, num_stages=STAGES):
        a, b, c = load_planes(a_ptr, b_ptr, c_ptr, tile, chunk, padded_columns, BITS, COLUMNS)
        if KIND != "int":
            weights = table_bytes(a, b, c, values, BITS, KIND, COLUMNS // 16)
        elif FP8:
            weights = fp8_words(a, b, c, BITS)
        else:
            weights = int8_words(a, b, c, signs, BITS)
        for i in tl.static_range(PARTS):
            x = tl.load(x_ptr + (x_row[:, None] * padded_columns + chunk * COLUMNS + i * SEGMENT + k[None, :]))
            if KIND == "int":  # noqa: SIM108
                w = words_operand(run(weights, i, PARTS), BITS)
            else:
                w = bytes_operand(run(weights, i, PARTS))
            w = tl.reshape(w, (BN, SEGMENT))
            scale = load_scale(
                scales_ptr, factors_ptr, chunk, tile[:, None], tile[:, None], row, padded_blocks, blocks,
                i * SEGMENT, COLUMNS, BLOCK, DOUBLE,
            )  # fmt: skip
            scale = tl.reshape(scale, (BN,))[:, None]
            if FP8:
                acc += tl.dot(w.to(tl.float8e4nv, bitcast=True), tl.trans(x), out_dtype=tl.float32) * scale
            else:
                x_scale = tl.load(x_scales_ptr + ((chunk * PARTS + i) * tokens + x_row))
                acc += tl.dot(w, tl.trans(x), out_dtype=tl.int32).to(tl.float32) * x_scale[None, :] * scale
    rows = pid_n * BN + tl.arange(0, BN)[:, None]
    seen = (rows < out_rows) & (m[None, :] < tokens)
    if FP8:
        acc *= (tl.load(x_scales_ptr + x_row) * multiplier)[None, :]
    else:
        acc *= multiplier
    if GATE != "":
        gate = tl.load(gate_ptr + m[None, :] * stride_gate + rows, mask=seen, other=0.0).to(tl.float32)
        acc *= act(gate, GATE)
    if BIAS:
        acc += tl.load(bias_ptr + rows, mask=rows < out_rows, other=0.0).to(tl.float32)
    if RESIDUAL:
        acc += tl.load(residual_ptr + m[None, :] * stride_residual + rows, mask=seen, other=0.0).to(tl.float32)
    tl.store(out_ptr + m[None, :] * stride_out + rows, acc.to(out_ptr.dtype.element_ty), mask=seen)


def segment_of(weight: TritonWeight) -> int:
    """Columns whose products the tensor cores sum before a scale: they share a scale of the weight.

    A property of the weight alone, not of the GPU: it is part of what an int8 product means.
    """
    return min(_low_bit(weight.block_size or MOST_SEGMENT), _low_bit(weight.padded[1]), MOST_SEGMENT)


def check_arch(kind: str, arch: str) -> None:
    """
    Raises:
        UnsupportedError: an architecture (`target.current_arch`) whose tensor cores do not take such operands.
    """
    if kind == "fp8" and arch not in FP8_ARCHES:
        raise UnsupportedError(
            f"--compute fp8 needs a GPU with e4m3 tensor cores (sm_89, sm_90, sm_100, sm_120), this is {arch}: use "
            "--compute int8 or fp16"
        )


def with_activations(weight: TritonWeight, kind: str) -> TritonWeight:
    """The weight, marked so that its products with many tokens round these.

    Args:
        weight: quantized, prepared for float16 or bfloat16. A float one is returned as it is: torch.matmul runs it.
        kind: "int8" or "fp8".

    Raises:
        UnsupportedError: a format that the kernel does not take; the message says which it does.
    """
    if kind not in KINDS:
        raise UnsupportedError(f"activations are rounded to {' or '.join(KINDS)}, not to {kind!r}")
    if weight.dense is not None or weight.activations == kind:
        return weight
    wide = 5
    reason = ""
    if weight.dtype == torch.float32:
        reason = "the weight was prepared for float32 activations"
    elif weight.rotation is not None:
        reason = "its products are those of rotated tokens, in half precision"
    elif weight.nested:
        reason = "its planes lie apart, and the kernel decodes those of plain formats"
    elif weight.offsets is not None:
        reason = "it has offsets, and the kernel only scales"
    elif segment_of(weight) < 32:
        reason = "an 8-bit instruction multiplies 32 columns, so a block must be a multiple of 32"
    elif kind == "fp8" and weight.bits > wide:
        reason = f"e4m3 has 4 significant bits, enough for {wide}-bit codes at most"
    elif weight.kind != "int" and weight.bits > wide:
        reason = f"a codebook of more than {wide} bits would lose as much again as its own rounding in 8 bits"
    if reason:
        others = "symmetric int at 2 to 5 bits" if kind == "fp8" else "symmetric int at 2 to 8 bits"
        raise UnsupportedError(
            f"--compute {kind} does not run {weight.format}: {reason}. It runs {others} and other types at 2 to "
            f"{wide}, in blocks of 32, 64, 128 and so on or whole rows; or use --compute fp16"
        )
    # The kernel's integers are (code - 2^(k-1)) times a power of two.
    if weight.kind == "int":
        unit = 2.0**9 if kind == "fp8" else 2.0 ** (weight.bits - 8)
        return replace(weight, activations=kind, table8=None, multiplier8=weight.multiplier * unit)
    table, factor = _table(weight, kind)
    return replace(weight, activations=kind, table8=table, multiplier8=weight.multiplier / factor)


def tokens_layout(weight: TritonWeight) -> tuple[str, int, int, int]:
    """See RoundedTokens.layout."""
    return weight.activations, weight.padded[1], segment_of(weight), order_of(weight.bits, weight.kind)


@triton.jit
def source_column(at, ORDER: tl.constexpr):
    """Which column of x stands at a place of the reordered ones (`codes8.order_of`)."""
    k0 = at % 4 // 2
    if ORDER == 16:
        column = at // 16 * 16 + at % 2 * 8 + at % 16 // 4 * 2 + k0
    else:
        column = at // 32 * 32 + at % 2 * 16 + at % 32 // 16 * 8 + at % 16 // 4 * 2 + k0
    return column


def _table(weight: TritonWeight, kind: str) -> tuple[torch.Tensor, float]:
    """The weight's table in 8 bits, and what its entries were multiplied with before they were rounded.

    The factor is the one of several that leaves the least squared error: from half of int8's range to all of it, an
    octave of e4m3, and those that make a grid's smallest value a power of two, which leaves a float grid exact.

    Returns:
        For "table" int8 (2^k,), for "pairs" int32 (4^k,) with two entries each, 16 bits apart.
    """
    assert weight.table is not None
    entries = weight.table.view(weight.dtype) if weight.kind == "pairs" else weight.table
    values = entries.double().cpu()
    largest = float(values.abs().max())
    if largest == 0.0:
        candidates = [1.0]
    elif kind == "int8":
        candidates = [steps / 4 / largest for steps in range(4 * 64, 4 * 127 + 1)]
    else:
        candidates = [2.0 ** (8 + step / 64) / largest for step in range(-64, 1)]
    positive = values[values > 0]
    limit = 127.0 if kind == "int8" else 448.0
    if len(positive):
        unit = 1.0 / float(positive.min())
        candidates += [unit * 2.0**power for power in range(12) if unit * 2.0**power * largest <= limit]
    errors = [float(((_round8(values * c, kind) / c - values) ** 2).sum()) for c in candidates]
    factor = candidates[errors.index(min(errors))]
    if kind == "fp8":
        table = (values * factor).to(torch.float8_e4m3fn).view(torch.int8)
    else:
        table = (values * factor).round().to(torch.int8)
    if weight.kind == "pairs":
        pairs = table.view(-1, 2).int() & 0xFF
        table = pairs[:, 0] | pairs[:, 1] << 16
    return table.to(weight.device).contiguous(), factor


def _round8(values: torch.Tensor, kind: str) -> torch.Tensor:
    return values.round() if kind == "int8" else values.to(torch.float8_e4m3fn).double()


def _low_bit(value: int) -> int:
    return value & -value
