"""Launches of the kernels of recurrent layers, for tools/aot.py."""

from __future__ import annotations

from typing import Any

import torch

from kbit.kernels.triton.recurrent.convolution import short_convolution
from kbit.kernels.triton.recurrent.recurrence import gated_delta, state_space
from kbit.kernels.triton.recurrent.sizes import RecurrentHeads, Sequences
from triton_lint.cases import Case, Gate
from triton_lint.chips import TARGETS
from triton_lint.driver import Launch
from triton_lint.model import Work

DELTA = RecurrentHeads(16, 32, 128, 128)  # Qwen3-Next's
SPACE = RecurrentHeads(1, 48, 128, 64)  # Granite 4.0 H Tiny's
SLOTS, PROMPT = 64, 2048


def meta(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def cases() -> list[Case]:
    return [
        recurrence_case("delta", DELTA, 1, 8, quick=True),
        recurrence_case("delta", DELTA, PROMPT, 1, quick=True),
        recurrence_case("space", SPACE, 1, 8),
        recurrence_case("space", SPACE, PROMPT, 1, quick=True),
        convolution_case(1, 8),
        convolution_case(PROMPT, 1, quick=True),
    ]


def sequences_of(tokens: int, count: int) -> Sequences:
    slots = meta(count, dtype=torch.int32)
    return Sequences(meta(count + 1, dtype=torch.int32), slots, slots, tokens)


def recurrence_case(rule: str, heads: RecurrentHeads, tokens: int, count: int, *, quick: bool = False) -> Case:
    """`count` sequences of `tokens` new tokens each."""
    numbers = heads.heads * heads.key_dim * heads.value_dim

    def launch(arch: str, config: Any) -> None:
        x, gates = meta(tokens * count, heads.width), meta(tokens * count, heads.heads, dtype=torch.float32)
        states = meta(SLOTS, heads.heads, heads.key_dim, heads.value_dim, dtype=torch.float32)
        rates, sequences = meta(heads.heads, dtype=torch.float32), sequences_of(tokens, count)
        if rule == "delta":
            gated_delta(x, gates, gates, rates, states, sequences, heads)
        else:
            state_space(x, gates, rates, rates, states, sequences, heads)

    def work(launch: Launch, config: Any) -> Work | None:
        if launch.kernel != "tokens_kernel":
            return None  # of chunks the hot loop's turns are not known to the model
        return Work(bytes=count * numbers * 8, units=count * numbers, steps=launch.programs)

    return Case(
        f"{rule}/{heads.heads}x{heads.key_dim}x{heads.value_dim}/{count}x{tokens}",
        launch,
        work=work,
        # (sm_90 keeps 4 registers of a state space's chunks in memory.)
        gates=dict.fromkeys(TARGETS, Gate()) | {"sm_90": Gate(spills=4 if rule == "space" and tokens > 1 else 0)},
        quick=quick,
    )


def convolution_case(tokens: int, count: int, *, width: int = 4, columns: int = 8192, quick: bool = False) -> Case:
    def launch(arch: str, config: Any) -> None:
        taps = meta(width * columns, dtype=torch.float32)
        states = meta(SLOTS, width - 1, columns, dtype=torch.float32)
        short_convolution(meta(tokens * count, columns), taps, None, states, sequences_of(tokens, count), width)

    return Case(
        f"convolution/{width}x{columns}/{count}x{tokens}",
        launch,
        gates=dict.fromkeys(TARGETS, Gate()),
        quick=quick,
    )
