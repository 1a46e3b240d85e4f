"""Gated delta rules and state spaces of a few new tokens per sequence, one after another.

Program (block of values, head, sequence): the columns of a head's state that belong to BV features of the values,
D_k x BV numbers in registers; what a token does to them needs no other program. Bound: memory, the states are read and
written once, 8 D_k D_v bytes a head and sequence. A launch depends on no value, so it can be captured in a CUDA graph.
"""

from __future__ import annotations

import triton
import triton.language as tl

UNIT_EPS = tl.constexpr(1e-6)  # reference_recurrent.UNIT_EPS


@triton.jit
def softplus(x):
    """log(1 + e^x), with the relative error of fp32 also where it is small (Kahan's way to log1p)."""
    small = tl.exp(-tl.abs(x))
    above = 1.0 + small
    rest = above - 1.0
    log1p = tl.where(rest == 0.0, small, tl.log(above) * (small / tl.where(rest == 0.0, 1.0, rest)))
    return tl.maximum(x, 0.0) + log1p


@triton.jit
def state_at(state_ptr, slot, head, key, value, H: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr):
    """Pointers (BK, BV) to a slot's numbers of a head."""
    return state_ptr + ((slot * H + head) * DK + key[:, None]) * DV + value[None, :]


@triton.jit(do_not_specialize=["stride_x"])
def tokens_kernel(
    x_ptr, decay_ptr, write_ptr, rate_ptr, skip_ptr, state_ptr, before_ptr, after_ptr, bounds_ptr, out_ptr, stride_x,
    stride_decay, stride_write,
    H: tl.constexpr, G: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, Q_AT: tl.constexpr, K_AT: tl.constexpr,
    V_AT: tl.constexpr, DELTA: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """See the module; arguments are those of `recurrence.launch`.

    Args:
        Q_AT, K_AT, V_AT: columns of x at which queries, keys and values begin.
        DELTA: the gated delta rule, which has `write`; else a state space, which has `skip`.
    """
    value = tl.program_id(0) * BV + tl.arange(0, BV)
    head = tl.program_id(1)
    sequence = tl.program_id(2)
    start = tl.load(bounds_ptr + sequence).to(tl.int64)
    stop = tl.load(bounds_ptr + sequence + 1).to(tl.int64)
    if start < stop:
        key = tl.arange(0, BK)
        keys = key < DK
        inside = keys[:, None] & (value < DV)[None, :]
        slot = tl.load(before_ptr + sequence).to(tl.int64)
        state = tl.load(state_at(state_ptr, slot, head, key, value, H, DK, DV), mask=inside & (slot >= 0), other=0.0)
        rate = tl.exp(tl.load(rate_ptr + head).to(tl.float32))
        of_keys = head // (H // G) * DK + key
        for token in range(start, stop):
            row = x_ptr + token * stride_x
            q = tl.load(row + Q_AT + of_keys, mask=keys, other=0.0).to(tl.float32)
            k = tl.load(row + K_AT + of_keys, mask=keys, other=0.0).to(tl.float32)
            v = tl.load(row + V_AT + head * DV + value, mask=value < DV, other=0.0).to(tl.float32)
            step = softplus(tl.load(decay_ptr + token * stride_decay + head).to(tl.float32))
            state = state * tl.exp(-rate * step)
            if DELTA:
                q = q * (DK**-0.5 / tl.sqrt(tl.sum(q * q, 0) + UNIT_EPS))
                k = k * (1.0 / tl.sqrt(tl.sum(k * k, 0) + UNIT_EPS))
                known = tl.sum(state * k[:, None], 0)
                written = tl.sigmoid(tl.load(write_ptr + token * stride_write + head).to(tl.float32)) * (v - known)
            else:
                written = step * v
            state += k[:, None] * written[None, :]
            out = tl.sum(state * q[:, None], 0)
            if not DELTA:
                out += tl.load(skip_ptr + head).to(tl.float32) * v
            to = out_ptr + (token * H + head) * DV + value
            tl.store(to, out.to(out_ptr.dtype.element_ty), mask=value < DV)
        tl.debug_barrier()  # the next state may be in the same slot
        next = tl.load(after_ptr + sequence).to(tl.int64)
        tl.store(state_at(state_ptr, next, head, key, value, H, DK, DV), state, mask=inside)
