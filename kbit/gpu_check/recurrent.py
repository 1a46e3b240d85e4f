"""Recurrent kernels against the reference: ragged sequences, their states, and how far both may be off."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from kbit.gpu_check.bounds import FP32_UNIT, assert_equal, assert_within, rounded, unit
from kbit.kernels import reference_recurrent as reference
from kbit.kernels.triton.recurrent.chunks import CHUNK
from kbit.kernels.triton.recurrent.convolution import short_convolution
from kbit.kernels.triton.recurrent.recurrence import gated_delta, state_space
from kbit.kernels.triton.recurrent.sizes import RecurrentHeads, Sequences

SLOTS = 9
DELTA = RecurrentHeads(2, 4, 20, 24)  # no power of two


@dataclass
class Batch:
    """Sequences of some lengths: the first begins, the others have states; the second leaves its next in its own."""

    counts: list[int]
    before: list[int]
    after: list[int]

    def on(self, device: str) -> Sequences:
        bounds = torch.tensor([0, *self.counts]).cumsum(0).to(torch.int32)
        before, after = (torch.tensor(slots, dtype=torch.int32, device=device) for slots in (self.before, self.after))
        return Sequences(bounds.to(device), before, after, max(self.counts))

    def rows(self) -> list[slice]:
        stops = torch.tensor([0, *self.counts]).cumsum(0).tolist()
        return [slice(*pair) for pair in pairwise(stops)]


def batch_of(*counts: int) -> Batch:
    before = [-1, 3, 5, 0][: len(counts)]
    after = [2, 3, 7, 1][: len(counts)]
    return Batch(list(counts), before, [slot if count else -1 for slot, count in zip(after, counts, strict=True)])


def numbers(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def recurrence_bound(
    states: torch.Tensor, v: torch.Tensor, magnitude: torch.Tensor, total: float, factors: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """How far outputs (T, H, D_v) and the last state (H, D_k, D_v) may be.

    What a token does to a column of the state is a contraction (its keys are of unit length and its shares below 1, or
    it only fades) and an addition. So the norm of a column's error grows by what each token's roundings add, relative
    to the column and to what is written: those of sums of D_k and of CHUNK products, of the system's solution, and of
    the logarithms of decays, whose sums within a chunk are at most `total`. Where factors of products are rounded to
    half precision these errors are far larger, and independent: their squares add up (Higham and Mary 2019; 4 standard
    deviations). An output is a sum of D_k products with a query, `magnitude` its length (T, H).

    Args:
        states: float64 (T + 1, H, D_k, D_v), the reference's before and after every token.
        v: what is written at most, (T, H, D_v).
        factors: type of what is multiplied.
    """
    columns, written = states.norm(dim=2), v.abs().double()  # (T + 1, H, D_v), (T, H, D_v)
    each = (states.shape[2] + 2 * CHUNK + 16) * FP32_UNIT
    state = each * (columns.sum(0) + written.sum(0)) + 2 * total * FP32_UNIT * (columns[0] + written.sum(0))
    if factors != torch.float32:
        state += 4 * unit(factors) * (columns.square().sum(0) + written.square().sum(0)).sqrt()
    tiny = torch.finfo(torch.float32).smallest_normal
    own = (each + (0.0 if factors == torch.float32 else 2 * unit(factors))) * columns.amax(0)
    outputs = magnitude.double()[..., None] * (state + own) + tiny
    return outputs, (state + tiny)[:, None, :].expand(states.shape[1:])


def stepped(run: Any, tokens: int, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs, and the states before and after every token, by a reference that is called for one token at a time."""
    outs, states = [], [state]
    for t in range(tokens):
        out, state = run(slice(t, t + 1), state)
        outs.append(out)
        states.append(state)
    return torch.cat(outs), torch.stack(states).double()


def check_delta(
    device: str, batch: Batch, heads: RecurrentHeads = DELTA, *, dtype: torch.dtype = torch.float32, **changes: Any
) -> float:
    tokens, chunked = sum(batch.counts), changes.pop("chunked", None)
    x = changes.pop("x", numbers(tokens, heads.width + 3, seed=1)).to(dtype)[:, : heads.width]  # rows lie apart
    decay = changes.pop("decay", numbers(tokens, heads.heads, seed=2))
    write = changes.pop("write", numbers(tokens, heads.heads, seed=3))
    rates = changes.pop("rates", numbers(heads.heads, seed=4))
    assert not changes
    states = numbers(SLOTS, heads.heads, heads.key_dim, heads.value_dim, seed=5)
    found = states.clone().to(device)
    got = gated_delta(
        x.to(device), decay.to(device), write.to(device), rates.to(device), found, batch.on(device), heads,
        out_dtype=torch.float32, chunked=chunked,
    ).cpu()  # fmt: skip
    found = found.cpu()
    keys = heads.key_heads * heads.key_dim
    q, k, v = (
        part.reshape(tokens, -1, dim).float()
        for part, dim in zip(x.split_with_sizes([keys, keys, heads.heads * heads.value_dim], dim=1),
                             (heads.key_dim, heads.key_dim, heads.value_dim), strict=True)
    )  # fmt: skip
    fades = reference.log_decay(decay, rates)
    worst = 0.0
    for rows, before, after in zip(batch.rows(), batch.before, batch.after, strict=True):
        if rows.start == rows.stop:
            continue
        parts = [part[rows] for part in (q, k, v, decay, write)]
        first = torch.zeros_like(states[0]) if before < 0 else states[before]
        outs, all_states = stepped(
            lambda t, s, p=parts: reference.gated_delta(p[0][t], p[1][t], p[2][t], p[3][t], p[4][t], rates, s),
            len(parts[0]),
            first,
        )
        total = float(fades[rows][:CHUNK].abs().sum(0).max()) if chunked else 0.0
        lengths = torch.full(parts[3].shape, heads.key_dim**-0.5)  # of the queries
        bound, of_state = recurrence_bound(all_states, v[rows], lengths, total, dtype if chunked else torch.float32)
        error = assert_within(got[rows].view_as(outs), outs, bound)
        worst = max(worst, error, assert_within(found[after], all_states[-1], of_state))
    kept = [slot for slot in range(SLOTS) if slot not in batch.after]
    return max(worst, assert_equal(found[kept], states[kept]))


def check_space(
    device: str, batch: Batch, heads: RecurrentHeads = DELTA, *, dtype: torch.dtype = torch.float32, **changes: Any
) -> float:
    tokens, chunked = sum(batch.counts), changes.pop("chunked", None)
    x = numbers(tokens, heads.width + 3, seed=1).to(dtype)[:, : heads.width]
    steps = changes.pop("steps", numbers(tokens, heads.heads, seed=2))
    rates = changes.pop("rates", numbers(heads.heads, seed=4))
    assert not changes
    skips = numbers(heads.heads, seed=3)
    states = numbers(SLOTS, heads.heads, heads.key_dim, heads.value_dim, seed=5)
    found = states.clone().to(device)
    got = state_space(
        x.to(device), steps.to(device), rates.to(device), skips.to(device), found, batch.on(device), heads,
        out_dtype=torch.float32, chunked=chunked,
    ).cpu()  # fmt: skip
    found = found.cpu()
    keys = heads.key_heads * heads.key_dim
    v, k, q = (
        part.reshape(tokens, -1, dim).float()
        for part, dim in zip(x.split_with_sizes([heads.heads * heads.value_dim, keys, keys], dim=1),
                             (heads.value_dim, heads.key_dim, heads.key_dim), strict=True)
    )  # fmt: skip
    group = heads.heads // heads.key_heads
    fades = reference.log_decay(steps, rates)
    worst = 0.0
    for rows, before, after in zip(batch.rows(), batch.before, batch.after, strict=True):
        if rows.start == rows.stop:
            continue
        parts = [part[rows] for part in (v, k, q, steps)]
        first = torch.zeros_like(states[0]) if before < 0 else states[before]
        outs, all_states = stepped(
            lambda t, s, p=parts: reference.state_space(p[0][t], p[1][t], p[2][t], p[3][t], rates, skips, s),
            len(parts[0]), first,
        )  # fmt: skip
        total = float(fades[rows][:CHUNK].abs().sum(0).max()) if chunked else 0.0
        lengths = q[rows].norm(dim=-1).repeat_interleave(group, 1)
        size = torch.nn.functional.softplus(steps[rows])[..., None] * v[rows]
        size = size * k[rows].norm(dim=-1).repeat_interleave(group, 1)[..., None]
        bound, of_state = recurrence_bound(all_states, size, lengths, total, dtype if chunked else torch.float32)
        past = 4 * FP32_UNIT * (skips[:, None] * v[rows]).abs()
        error = assert_within(got[rows].view_as(outs), outs, bound + past)
        worst = max(worst, error, assert_within(found[after], all_states[-1], of_state))
    kept = [slot for slot in range(SLOTS) if slot not in batch.after]
    return max(worst, assert_equal(found[kept], states[kept]))


def check_convolution(device: str, width: int, columns: int, bias: bool, counts: tuple[int, ...]) -> float:
    """A short convolution of sequences of some lengths, and the states that it leaves."""
    batch = batch_of(*counts)
    x = numbers(sum(counts), columns + 1, seed=1).half()[:, :columns]
    weight, shift = numbers(width * columns, seed=2), numbers(columns, seed=3) if bias else None
    states = numbers(SLOTS, width - 1, columns, seed=4)
    found = states.clone().to(device)
    got = short_convolution(
        x.to(device), weight.to(device), None if shift is None else shift.to(device), found, batch.on(device), width,
        torch.float32,
    ).cpu()  # fmt: skip
    found = found.cpu()
    worst = 0.0
    for rows, before, after in zip(batch.rows(), batch.before, batch.after, strict=True):
        if rows.start == rows.stop:
            continue
        first = torch.zeros_like(states[0]) if before < 0 else states[before]
        expected, last = reference.short_convolution(x[rows], weight.view(width, columns), first)
        size, _ = reference.short_convolution(x[rows].abs(), weight.view(width, columns).abs(), first.abs())
        if shift is not None:
            expected, size = expected + shift, size + shift.abs()
        error = assert_within(
            got[rows], expected, 2 * (width + 1) * FP32_UNIT * size + rounded(expected, torch.float32)
        )
        worst = max(worst, error, assert_equal(found[after], last))
    kept = [slot for slot in range(SLOTS) if slot not in batch.after]
    return max(worst, assert_equal(found[kept], states[kept]))
