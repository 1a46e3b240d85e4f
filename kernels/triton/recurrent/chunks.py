"""Gated delta rules and state spaces of many new tokens, CHUNK at a time.

As `reference_recurrent.gated_delta_in_chunks` and `state_space_in_chunks` have it. Of a chunk, with L_t the sum of log
decays up to token t and S the state before it, what tokens write solves a unit lower triangular system (the UT
transform; Yang et al. 2024, arXiv 2406.06484; with decays 2412.06464):

    (1 + A) U = b (V - exp(L) K S),     A_ts = b_t exp(L_t - L_s) (k_t . k_s) for s < t

    inverse_kernel    program (chunk, head, sequence): (1 + A)^-1, row by row. No chunk waits for another
    chunks_kernel     program (block of values, head, sequence): goes through the chunks with the block's columns of
                      the state, by products of tiles; a state space writes U = d X without a system

(1 + A)^-1 by substitution and not by products of powers of A: these have entries that cancel, up to 10^8 where keys
are alike, while none of the inverse passes 1. What is multiplied is rounded to x's type, as in all products of the
backend; sums, decays and the state that goes from chunk to chunk stay in fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kbit.kernels.triton.recurrent.tokens import UNIT_EPS, softplus, state_at

CHUNK = 32


@triton.jit
def unit_rows(x):
    """reference_recurrent.unit of the rows of a tile, in its type."""
    wide = x.to(tl.float32)
    return (wide * (1.0 / tl.sqrt(tl.sum(wide * wide, 1) + UNIT_EPS))[:, None]).to(x.dtype)


@triton.jit
def product(a, b, like):
    """a b, float32, its factors rounded to the type of `like`."""
    return tl.dot(a.to(like.dtype), b.to(like.dtype), input_precision="ieee")


@triton.jit
def inverse_kernel(
    x_ptr, decay_ptr, write_ptr, rate_ptr, bounds_ptr, inverse_ptr, stride_x, stride_decay, stride_write,
    H: tl.constexpr, G: tl.constexpr, DK: tl.constexpr, K_AT: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Rows of (1 + A)^-1 by token: inverse (N, H, C) float32."""
    head = tl.program_id(1)
    sequence = tl.program_id(2)
    first = tl.load(bounds_ptr + sequence).to(tl.int64) + tl.program_id(0) * C
    stop = tl.load(bounds_ptr + sequence + 1).to(tl.int64)
    if first < stop:
        at = tl.arange(0, C)
        token = first + at
        there = token < stop
        key = tl.arange(0, BK)
        rows = (x_ptr + token * stride_x + K_AT + head // (H // G) * DK)[:, None] + key[None, :]
        k = unit_rows(tl.load(rows, mask=there[:, None] & (key < DK)[None, :], other=0.0))
        step = softplus(tl.load(decay_ptr + token * stride_decay + head, mask=there, other=0.0).to(tl.float32))
        total = tl.cumsum(tl.where(there, -tl.exp(tl.load(rate_ptr + head).to(tl.float32)) * step, 0.0), 0)
        share = tl.load(write_ptr + token * stride_write + head, mask=there, other=0.0).to(tl.float32)
        share = tl.where(there, tl.sigmoid(share), 0.0)
        # A transposed, (s, t): a row of A is then a column, and meets the rows of the inverse without moving
        fade = tl.exp(tl.minimum(total[None, :] - total[:, None], 0.0))
        system = share[None, :] * fade * product(k, tl.trans(k), k)
        system = tl.where(at[:, None] < at[None, :], system, 0.0)
        inverse = tl.where(at[:, None] == at[None, :], 1.0, 0.0)
        for t in range(1, C):
            row = tl.sum(tl.where(at[None, :] == t, system, 0.0), 1)
            new = tl.where(at == t, 1.0, 0.0) - tl.sum(row[:, None] * inverse, 0)
            inverse = tl.where(at[:, None] == t, new[None, :], inverse)
        to = inverse_ptr + (token * H + head)[:, None] * C + at[None, :]
        tl.store(to, inverse, mask=there[:, None])


@triton.jit
def chunks_kernel(
    x_ptr, decay_ptr, rate_ptr, write_ptr, skip_ptr, inverse_ptr, state_ptr, before_ptr, after_ptr, bounds_ptr, out_ptr,
    stride_x, stride_decay, stride_write,
    H: tl.constexpr, G: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, Q_AT: tl.constexpr, K_AT: tl.constexpr,
    V_AT: tl.constexpr, DELTA: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """See the module; arguments as for tokens_kernel."""
    value = tl.program_id(0) * BV + tl.arange(0, BV)
    head = tl.program_id(1)
    sequence = tl.program_id(2)
    start = tl.load(bounds_ptr + sequence).to(tl.int64)
    stop = tl.load(bounds_ptr + sequence + 1).to(tl.int64)
    if start < stop:
        key, at = tl.arange(0, BK), tl.arange(0, C)
        inside = (key < DK)[:, None] & (value < DV)[None, :]
        slot = tl.load(before_ptr + sequence).to(tl.int64)
        state = tl.load(state_at(state_ptr, slot, head, key, value, H, DK, DV), mask=inside & (slot >= 0), other=0.0)
        rate = tl.exp(tl.load(rate_ptr + head).to(tl.float32))
        of_keys = head // (H // G) * DK + key
        for chunk in range(tl.cdiv(stop - start, C)):
            token = start + chunk * C + at
            there = token < stop
            rows = (x_ptr + token * stride_x)[:, None]
            keys = there[:, None] & (key < DK)[None, :]
            values = there[:, None] & (value < DV)[None, :]
            q = tl.load(rows + Q_AT + of_keys[None, :], mask=keys, other=0.0)
            k = tl.load(rows + K_AT + of_keys[None, :], mask=keys, other=0.0)
            v = tl.load(rows + V_AT + head * DV + value[None, :], mask=values, other=0.0).to(tl.float32)
            step = softplus(tl.load(decay_ptr + token * stride_decay + head, mask=there, other=0.0).to(tl.float32))
            fade = tl.where(there, -rate * step, 0.0)
            total, whole = tl.cumsum(fade, 0), tl.sum(fade, 0)
            since = tl.exp(total)[:, None]
            if DELTA:
                q, k = unit_rows(q), unit_rows(k)
                share = tl.sigmoid(
                    tl.load(write_ptr + token * stride_write + head, mask=there, other=0.0).to(tl.float32)
                )  # fmt: skip
                known = product(k, state, k)
                wanted = tl.where(there, share, 0.0)[:, None] * (v - since * known)
                tile = inverse_ptr + (token * H + head)[:, None] * C + at[None, :]
                solved = tl.load(tile, mask=there[:, None], other=0.0)
                written = product(solved, wanted, k)
            else:
                written = step[:, None] * v
            between = tl.exp(tl.minimum(total[:, None] - total[None, :], 0.0))
            scores = product(q, tl.trans(k), k)
            scores = tl.where(at[:, None] >= at[None, :], between * scores, 0.0)
            out = since * product(q, state, k) + product(scores, written, k)
            if DELTA:
                out *= DK**-0.5
            else:
                out += tl.load(skip_ptr + head).to(tl.float32) * v
            left = tl.trans(k * tl.exp(tl.minimum(whole - total, 0.0))[:, None])
            state = tl.exp(whole) * state + product(left, written, k)
            to = out_ptr + (token * H + head)[:, None] * DV + value[None, :]
            tl.store(to, out.to(out_ptr.dtype.element_ty), mask=values)
        tl.debug_barrier()  # the next state may be in the same slot
        next = tl.load(after_ptr + sequence).to(tl.int64)
        tl.store(state_at(state_ptr, next, head, key, value, H, DK, DV), state, mask=inside)
