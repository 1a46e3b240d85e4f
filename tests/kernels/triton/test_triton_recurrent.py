"""Short convolutions, gated delta rules and state spaces against the reference: ragged sequences, states, extremes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from triton_cases import FP32_UNIT, HALF, assert_within, rounded, unit

triton = pytest.importorskip("triton")

from kbit.host.errors import UnsupportedError  # noqa: E402
from kbit.kernels import reference_recurrent as reference  # noqa: E402
from kbit.kernels.triton.recurrent.chunks import CHUNK  # noqa: E402
from kbit.kernels.triton.recurrent.convolution import short_convolution  # noqa: E402
from kbit.kernels.triton.recurrent.recurrence import gated_delta, state_space  # noqa: E402
from kbit.kernels.triton.recurrent.sizes import RecurrentHeads, Sequences  # noqa: E402

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
) -> None:
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
        for part, dim in zip(x.split([keys, keys, heads.heads * heads.value_dim], dim=1),
                             (heads.key_dim, heads.key_dim, heads.value_dim), strict=True)
    )  # fmt: skip
    fades = reference.log_decay(decay, rates)
    for rows, before, after in zip(batch.rows(), batch.before, batch.after, strict=True):
        if rows.start == rows.stop:
            continue
        parts = [part[rows] for part in (q, k, v, decay, write)]
        first = torch.zeros_like(states[0]) if before < 0 else states[before]
        outs, all_states = stepped(
            lambda t, s, parts=parts: reference.gated_delta(*(part[t] for part in parts), rates, s),
            len(parts[0]),
            first,
        )
        total = float(fades[rows].abs().split(CHUNK)[0].sum(0).max()) if chunked else 0.0
        lengths = torch.full(parts[3].shape, heads.key_dim**-0.5)  # of the queries
        bound, of_state = recurrence_bound(all_states, v[rows], lengths, total, dtype if chunked else torch.float32)
        assert_within(got[rows].view_as(outs), outs, bound)
        assert_within(found[after], all_states[-1], of_state)
    kept = [slot for slot in range(SLOTS) if slot not in batch.after]
    assert torch.equal(found[kept], states[kept])


def check_space(
    device: str, batch: Batch, heads: RecurrentHeads = DELTA, *, dtype: torch.dtype = torch.float32, **changes: Any
) -> None:
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
        for part, dim in zip(x.split([heads.heads * heads.value_dim, keys, keys], dim=1),
                             (heads.value_dim, heads.key_dim, heads.key_dim), strict=True)
    )  # fmt: skip
    group = heads.heads // heads.key_heads
    fades = reference.log_decay(steps, rates)
    for rows, before, after in zip(batch.rows(), batch.before, batch.after, strict=True):
        if rows.start == rows.stop:
            continue
        parts = [part[rows] for part in (v, k, q, steps)]
        first = torch.zeros_like(states[0]) if before < 0 else states[before]
        outs, all_states = stepped(
            lambda t, s, parts=parts: reference.state_space(*(part[t] for part in parts), rates, skips, s),
            len(parts[0]), first,
        )  # fmt: skip
        total = float(fades[rows].abs().split(CHUNK)[0].sum(0).max()) if chunked else 0.0
        lengths = q[rows].norm(dim=-1).repeat_interleave(group, 1)
        size = torch.nn.functional.softplus(steps[rows])[..., None] * v[rows]
        size = size * k[rows].norm(dim=-1).repeat_interleave(group, 1)[..., None]
        bound, of_state = recurrence_bound(all_states, size, lengths, total, dtype if chunked else torch.float32)
        past = 4 * FP32_UNIT * (skips[:, None] * v[rows]).abs()
        assert_within(got[rows].view_as(outs), outs, bound + past)
        assert_within(found[after], all_states[-1], of_state)


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("check", [check_delta, check_space])
def test_ragged_sequences(check: Any, chunked: bool, device: str) -> None:
    """One token, several chunks, none, and a chunk exactly; one goes on in its own slot."""
    check(device, batch_of(1, 2 * CHUNK + 3, 0, 5) if chunked else batch_of(1, 4, 0, 2), chunked=chunked)
    if chunked:
        check(device, batch_of(CHUNK), chunked=True)


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("heads", [RecurrentHeads(1, 1, 16, 16), RecurrentHeads(3, 3, 128, 70)])
def test_sizes(heads: RecurrentHeads, chunked: bool, device: str) -> None:
    check_delta(device, batch_of(9, 3), heads, chunked=chunked)
    check_space(device, batch_of(9, 3), heads, chunked=chunked)


@pytest.mark.parametrize("dtype", HALF)
def test_types(dtype: torch.dtype, device: str) -> None:
    for chunked in (False, True):
        check_delta(device, batch_of(3, 9), dtype=dtype, chunked=chunked)
        check_space(device, batch_of(3, 9), dtype=dtype, chunked=chunked)


@pytest.mark.parametrize("chunked", [False, True])
def test_extremes(chunked: bool, device: str) -> None:
    """Keys all alike and written whole, so that powers of the system cancel; zeros; decays to nothing and to none."""
    tokens, heads = (CHUNK + 5, DELTA) if chunked else (6, DELTA)
    alike = numbers(1, heads.width, seed=6).expand(tokens, -1).clone()
    alike[:, 2 * heads.key_heads * heads.key_dim :] = numbers(tokens, heads.heads * heads.value_dim, seed=7)
    whole, none = torch.full((tokens, heads.heads), 30.0), torch.full((tokens, heads.heads), -30.0)
    check_delta(device, batch_of(tokens), x=alike, write=whole, decay=none, chunked=chunked)
    check_delta(device, batch_of(tokens), x=torch.zeros_like(alike), chunked=chunked)
    check_delta(device, batch_of(tokens), decay=whole, chunked=chunked)
    check_space(device, batch_of(tokens), steps=none, chunked=chunked)
    check_space(device, batch_of(tokens), steps=whole / 10, chunked=chunked)


def test_small_steps_keep_their_digits(device: str) -> None:
    """softplus of -12 is 6e-6: log(1 + x) would have lost five of its seven digits."""
    heads = RecurrentHeads(1, 1, 16, 16)
    x = torch.ones(1, heads.width)
    states = torch.zeros(2, 1, 16, 16, device=device)
    zero = torch.zeros(1)
    got = state_space(
        x.to(device), torch.full((1, 1), -12.0, device=device), zero.to(device), zero.to(device), states,
        Sequences(*(torch.tensor(v, dtype=torch.int32, device=device) for v in ([0, 1], [-1], [1])), 1), heads,
    ).cpu()  # fmt: skip
    expected = 16 * torch.nn.functional.softplus(torch.tensor(-12.0, dtype=torch.float64))
    assert_within(got, expected.expand_as(got), 32 * FP32_UNIT * float(expected))


@pytest.mark.parametrize(("width", "columns", "bias"), [(2, 1, False), (4, 130, True), (5, 48, False)])
@pytest.mark.parametrize("counts", [(1, 1, 1), (3, 40, 0, 2), (1, 17)])
def test_convolutions(width: int, columns: int, bias: bool, counts: tuple[int, ...], device: str) -> None:
    """Sequences shorter than the convolution, too, whose next state has some of the one before."""
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
    for rows, before, after in zip(batch.rows(), batch.before, batch.after, strict=True):
        if rows.start == rows.stop:
            continue
        first = torch.zeros_like(states[0]) if before < 0 else states[before]
        expected, last = reference.short_convolution(x[rows], weight.view(width, columns), first)
        size, _ = reference.short_convolution(x[rows].abs(), weight.view(width, columns).abs(), first.abs())
        if shift is not None:
            expected, size = expected + shift, size + shift.abs()
        assert_within(got[rows], expected, 2 * (width + 1) * FP32_UNIT * size + rounded(expected, torch.float32))
        assert torch.equal(found[after], last)
    kept = [slot for slot in range(SLOTS) if slot not in batch.after]
    assert torch.equal(found[kept], states[kept])


def test_refuses(device: str) -> None:
    batch, heads = batch_of(2), RecurrentHeads(1, 2, 16, 16)
    x, gates, rates = torch.zeros(2, heads.width), torch.zeros(2, 2), torch.zeros(2)
    states = torch.zeros(SLOTS, 2, 16, 16)
    with pytest.raises(UnsupportedError, match="keys of up to 256 features, not 272; use --device cpu"):
        RecurrentHeads(1, 1, 272, 16)
    with pytest.raises(ValueError, match="x: \\(2, 64\\)"):
        gated_delta(x[:, 1:], gates, gates, rates, states, batch.on(device), heads)
    with pytest.raises(ValueError, match="write"):
        gated_delta(x, gates, gates[:1], rates, states, batch.on(device), heads)
    with pytest.raises(ValueError, match="states: contiguous float32"):
        gated_delta(x, gates, gates, rates, states.half(), batch.on(device), heads)
    with pytest.raises(ValueError, match="log_rates"):
        gated_delta(x, gates, gates, rates[:1], states, batch.on(device), heads)
    with pytest.raises(ValueError, match="skips"):
        state_space(x, gates, rates, rates[:1], states, batch.on(device), heads)
    with pytest.raises(ValueError, match="weight"):
        short_convolution(x, rates, None, torch.zeros(SLOTS, 3, 64), batch.on(device), 4)
    sequences = Sequences(torch.zeros(2, dtype=torch.int32), torch.zeros(2), torch.zeros(2), 1)
    with pytest.raises(ValueError, match="2 sequences"):
        gated_delta(x, gates, gates, rates, states, sequences, heads)
