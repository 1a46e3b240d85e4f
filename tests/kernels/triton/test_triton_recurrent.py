"""Short convolutions, gated delta rules and state spaces against the reference: ragged sequences, states, extremes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from triton_cases import FP32_UNIT, HALF, assert_within

triton = pytest.importorskip("triton")

from kbit.gpu_check.recurrent import (  # noqa: E402
    DELTA,
    SLOTS,
    batch_of,
    check_convolution,
    check_delta,
    check_space,
    numbers,
)
from kbit.host.errors import UnsupportedError  # noqa: E402
from kbit.kernels.triton.recurrent.chunks import CHUNK  # noqa: E402
from kbit.kernels.triton.recurrent.convolution import short_convolution  # noqa: E402
from kbit.kernels.triton.recurrent.recurrence import gated_delta, state_space  # noqa: E402
from kbit.kernels.triton.recurrent.sizes import RecurrentHeads, Sequences  # noqa: E402


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
    check_convolution(device, width, columns, bias, counts)


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
