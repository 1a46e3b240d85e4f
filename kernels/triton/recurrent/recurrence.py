"""Gated delta rules and state spaces over the sequences of a pass: which kernel takes them, and its arguments."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from kbit.kernels.triton.product.limits import DECODE_TOKENS
from kbit.kernels.triton.recurrent.chunks import CHUNK, chunks_kernel, inverse_kernel
from kbit.kernels.triton.recurrent.sizes import (
    RecurrentHeads,
    Sequences,
    check_rows,
    check_sequences,
    check_states,
)
from kbit.kernels.triton.recurrent.tokens import tokens_kernel

STATE_NUMBERS = 4096  # of a program


@dataclass(frozen=True, eq=False)
class _Inputs:
    """What both rules have: x (N, width), with q, k and v from columns `places` on; decays (N, H), rates (H,)."""

    x: torch.Tensor
    places: tuple[int, int, int]
    decay: torch.Tensor
    log_rates: torch.Tensor
    heads: RecurrentHeads


def gated_delta(
    x: torch.Tensor,
    decay: torch.Tensor,
    write: torch.Tensor,
    log_rates: torch.Tensor,
    states: torch.Tensor,
    sequences: Sequences,
    heads: RecurrentHeads,
    *,
    out_dtype: torch.dtype | None = None,
    chunked: bool | None = None,
) -> torch.Tensor:
    """`reference_recurrent.gated_delta` of every sequence of a pass.

    Args:
        x: (N, 2 G D_k + H D_v) fp16, bf16 or fp32: queries, keys and values side by side; features contiguous.
        decay: (N, H), float32.
        write: (N, H), float32.
        log_rates: float32 (H,).
        states: float32 (slots, H, D_k, D_v), changed.
        sequences: of the pass.
        heads: the layer's.
        out_dtype: x's unless given.
        chunked: which kernels; None: by the number of tokens.

    Returns:
        (N, H D_v).

    Raises:
        ValueError: shapes or types that do not fit.
    """
    keys = heads.key_heads * heads.key_dim
    inputs = _Inputs(x, (0, keys, 2 * keys), decay, log_rates, heads)
    check_rows("write", write, len(x), heads.heads)
    return _launch(inputs, write, None, states, sequences, out_dtype, chunked)


def state_space(
    x: torch.Tensor,
    steps: torch.Tensor,
    log_rates: torch.Tensor,
    skips: torch.Tensor,
    states: torch.Tensor,
    sequences: Sequences,
    heads: RecurrentHeads,
    *,
    out_dtype: torch.dtype | None = None,
    chunked: bool | None = None,
) -> torch.Tensor:
    """`reference_recurrent.state_space` of every sequence of a pass.

    Args:
        x: (N, H D_v + 2 G D_k): values, keys and queries side by side; otherwise as for gated_delta.
        steps: (N, H), float32.
        skips: float32 (H,).
        log_rates, states, sequences, heads, out_dtype, chunked: as for gated_delta.

    Returns:
        (N, H D_v).

    Raises:
        ValueError: shapes or types that do not fit.
    """
    values, keys = heads.heads * heads.value_dim, heads.key_heads * heads.key_dim
    inputs = _Inputs(x, (values + keys, values, 0), steps, log_rates, heads)
    if skips.shape != (heads.heads,):
        raise ValueError(f"skips: ({heads.heads},) wanted, not {tuple(skips.shape)}")
    return _launch(inputs, None, skips, states, sequences, out_dtype, chunked)


def _launch(
    inputs: _Inputs,
    write: torch.Tensor | None,
    skips: torch.Tensor | None,
    states: torch.Tensor,
    sequences: Sequences,
    out_dtype: torch.dtype | None,
    chunked: bool | None,
) -> torch.Tensor:
    x, heads, decay, log_rates = inputs.x, inputs.heads, inputs.decay, inputs.log_rates
    tokens, count = len(x), heads.heads
    check_sequences(sequences)
    check_rows("x", x, tokens, heads.width)
    check_rows("decay", decay, tokens, count)
    check_states(states, (count, heads.key_dim, heads.value_dim))
    if log_rates.shape != (count,):
        raise ValueError(f"log_rates: ({count},) wanted, not {tuple(log_rates.shape)}")
    out = torch.empty((tokens, count * heads.value_dim), dtype=out_dtype or x.dtype, device=x.device)
    if tokens == 0:
        return out
    sizes = {
        "H": count, "G": heads.key_heads, "DK": heads.key_dim, "DV": heads.value_dim, "BK": heads.key_block,
        "Q_AT": inputs.places[0], "K_AT": inputs.places[1], "V_AT": inputs.places[2], "DELTA": write is not None,
    }  # fmt: skip
    written = decay if write is None else write
    skipped = log_rates if skips is None else skips
    strides = (x.stride(0), decay.stride(0), written.stride(0))
    slots = (states, sequences.before, sequences.after, sequences.bounds, out)
    block = max(16, min(triton.next_power_of_2(heads.value_dim), STATE_NUMBERS // heads.key_block))
    grid = (triton.cdiv(heads.value_dim, block), count, sequences.count)
    if not (sequences.longest > DECODE_TOKENS if chunked is None else chunked):
        tokens_kernel[grid](
            x, decay, written, log_rates, skipped, *slots, *strides, BV=block, num_warps=4, **sizes,
        )  # fmt: skip
        return out
    inverse = out
    if write is not None:
        inverse = torch.empty((tokens, count, CHUNK), dtype=torch.float32, device=x.device)
        inverse_kernel[(triton.cdiv(sequences.longest, CHUNK), count, sequences.count)](
            x, decay, write, log_rates, sequences.bounds, inverse, *strides, H=count, G=heads.key_heads,
            DK=heads.key_dim, K_AT=inputs.places[1], BK=heads.key_block, C=CHUNK, num_warps=2,
        )  # fmt: skip
    chunks_kernel[grid](
        x, decay, log_rates, written, skipped, inverse, *slots, *strides, BV=block, C=CHUNK,
        num_warps=4, num_stages=1, **sizes,
    )  # fmt: skip
    return out
