"""Short convolutions: every feature's weighted sum over its sequence's last few tokens.

    x (N, C) -> (N, C)      weight (W C,), bias (C,)      states (slots, W - 1, C) fp32: the inputs before

Program (token tile, feature block, sequence): TILE tokens, each read once from memory and W - 1 times from the cache.
The first tile of a sequence alone reads the state, and writes the next one, so both may be in one slot. Bound: memory,
2 C elements a token; at decode the states, 8 (W - 1) C bytes a sequence.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kbit.kernels.triton.recurrent.sizes import Sequences, check_rows, check_sequences, check_states

TILE = 16  # tokens of a program where a sequence may have many; W is at most one more
BLOCK = 128  # features


@triton.jit
def inputs_at(x_ptr, state_ptr, slot, start, index, mask, feature, stride_x, columns, W: tl.constexpr):
    """Inputs of a sequence by index, float32; a negative one is the state's, or zero where there is none.

    Args:
        start: the sequence's first token.
        index: from -(W - 1) on.
        mask: which to read.
    """
    new = tl.load(x_ptr + (start + index) * stride_x + feature, mask=mask & (index >= 0), other=0.0).to(tl.float32)
    row = slot * (W - 1) + (index + (W - 1))
    old = tl.load(state_ptr + row * columns + feature, mask=mask & (index < 0) & (slot >= 0), other=0.0)
    return new + old  # one of them is zero


@triton.jit(do_not_specialize=["stride_x"])
def convolution_kernel(
    x_ptr, weight_ptr, bias_ptr, state_ptr, before_ptr, after_ptr, bounds_ptr, out_ptr, columns, stride_x,
    W: tl.constexpr, HAS_BIAS: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """See the module."""
    tile = tl.program_id(0)
    feature = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    sequence = tl.program_id(2)
    start = tl.load(bounds_ptr + sequence).to(tl.int64)
    count = tl.load(bounds_ptr + sequence + 1).to(tl.int64) - start
    if tile * T < count:
        slot = tl.load(before_ptr + sequence).to(tl.int64)
        token = (tile * T + tl.arange(0, T))[:, None].to(tl.int64)
        there = (token < count) & (feature < columns)
        sums = tl.zeros((T, BLOCK), tl.float32)
        for i in tl.static_range(W):
            taps = tl.load(weight_ptr + i * columns + feature, mask=feature < columns, other=0.0).to(tl.float32)
            x = inputs_at(x_ptr, state_ptr, slot, start, token + (i - (W - 1)), there, feature, stride_x, columns, W)
            sums += taps * x
        if HAS_BIAS:
            sums += tl.load(bias_ptr + feature, mask=feature < columns, other=0.0).to(tl.float32)
        tl.store(out_ptr + (start + token) * columns + feature, sums.to(out_ptr.dtype.element_ty), mask=there)
        if tile == 0:
            next = ()
            for j in tl.static_range(W - 1):
                index = count - (W - 1) + j
                kept = feature < columns
                next = next + (
                    inputs_at(x_ptr, state_ptr, slot, start, index, kept, feature, stride_x, columns, W),
                )  # fmt: skip
            tl.debug_barrier()  # all of the old state is read before any of the new one is written
            to = state_ptr + tl.load(after_ptr + sequence).to(tl.int64) * ((W - 1) * columns)
            for j in tl.static_range(W - 1):
                tl.store(to + j * columns + feature, next[j], mask=feature < columns)


def short_convolution(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    states: torch.Tensor,
    sequences: Sequences,
    width: int,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """`reference_recurrent.short_convolution` of every sequence of a pass.

    Args:
        x: (N, C) fp16, bf16 or fp32, features contiguous.
        weight: (W C,), the oldest token's factors first.
        bias: (C,) or None.
        states: float32 (slots, W - 1, C), changed.
        sequences: of the pass.
        width: W, 2 to 17.
        out_dtype: x's unless given.

    Returns:
        (N, C).

    Raises:
        ValueError: shapes or types that do not fit.
    """
    tokens, columns = x.shape
    check_sequences(sequences)
    check_rows("x", x, tokens, columns)
    check_states(states, (width - 1, columns))
    if not 2 <= width <= TILE + 1:
        raise ValueError(f"a convolution over {width} tokens: 2 to {TILE + 1} are supported")
    if weight.shape != (width * columns,) or (bias is not None and bias.shape != (columns,)):
        raise ValueError(f"weight: ({width * columns},) and bias: ({columns},) wanted, not {tuple(weight.shape)}")
    out = torch.empty((tokens, columns), dtype=out_dtype or x.dtype, device=x.device)
    if tokens == 0:
        return out
    tile = 1 if sequences.longest == 1 else TILE
    grid = (triton.cdiv(sequences.longest, tile), triton.cdiv(columns, BLOCK), sequences.count)
    convolution_kernel[grid](
        x,
        weight,
        weight if bias is None else bias,
        states,
        sequences.before,
        sequences.after,
        sequences.bounds,
        out,
        columns,
        x.stride(0),
        W=width,
        HAS_BIAS=bias is not None,
        T=tile,
        BLOCK=BLOCK,
        num_warps=1 if tile == 1 else 4,
    )
    return out
