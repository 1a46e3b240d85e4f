"""States of recurrent layers on the device, and the operations that read and write them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kbit.backends.triton.weight import triton_vector
from kbit.graph.operations import Convolve, Recur, Scan
from kbit.graph.states import Recurrence, StateSpace, StateSpec
from kbit.kernels.triton.recurrent.convolution import short_convolution
from kbit.kernels.triton.recurrent.recurrence import gated_delta, state_space
from kbit.kernels.triton.recurrent.sizes import RecurrentHeads, Sequences


class TritonStates:
    """Slots of states on a device (a `kbit.graph.pages.PageStore`, a slot being a page).

    Args:
        specs: the model's states.
        count: slots, at least 1.
        device: where.

    Attributes:
        arrays: per state (count, *shape).
        version: changes when these are other tensors than before.
    """

    def __init__(self, specs: Sequence[StateSpec], count: int, device: torch.device | str) -> None:
        self.specs = tuple(specs)
        self.arrays = [
            torch.zeros((count, *spec.shape), dtype=getattr(torch, spec.dtype), device=device) for spec in specs
        ]
        self.version = 0

    @property
    def count(self) -> int:
        """Slots."""
        return len(self.arrays[0])

    @property
    def page_bytes(self) -> int:
        """Bytes of a slot."""
        return sum(spec.nbytes for spec in self.specs)

    def resize(self, count: int) -> None:
        """Memory for `count` slots; those there are keep their contents."""
        for index, old in enumerate(self.arrays):
            self.arrays[index] = old.new_zeros((count, *old.shape[1:]))
            self.arrays[index][: len(old)] = old
        self.version += 1

    def copy(self, source: int, target: int) -> None:
        """Makes slot `target` the same as `source`."""
        for array in self.arrays:
            array[target] = array[source]


@dataclass(frozen=True, eq=False)
class PassStates:
    """The states that a pass reads and writes.

    Attributes:
        arrays: of the store.
        sequences: whose tokens these are, and where their states are.
    """

    arrays: Sequence[torch.Tensor]
    sequences: Sequences


def heads_of(described: Recurrence | StateSpace) -> RecurrentHeads:
    """What the kernels are told of a layer.

    Raises:
        UnsupportedError: heads that they do not have.
    """
    shared = described.key_heads if isinstance(described, Recurrence) else described.groups
    return RecurrentHeads(shared, described.heads, described.key_dim, described.value_dim)


def recur(
    operation: Recur, x: torch.Tensor, decay: torch.Tensor, write: torch.Tensor, states: PassStates, out: torch.dtype
) -> torch.Tensor:
    """x (N, width), decay and write float32 (N, H) -> (N, H D_v)."""
    rule = operation.recurrence
    return gated_delta(
        x, decay, write, triton_vector(operation.log_rates), states.arrays[rule.state], states.sequences,
        heads_of(rule), out_dtype=out,
    )  # fmt: skip


def scan(operation: Scan, x: torch.Tensor, steps: torch.Tensor, states: PassStates, out: torch.dtype) -> torch.Tensor:
    """x (N, width), steps float32 (N, H) -> (N, H D_v)."""
    rates, skips, space = triton_vector(operation.log_rates), triton_vector(operation.skips), operation.space
    return state_space(
        x, steps, rates, skips, states.arrays[space.state], states.sequences, heads_of(space), out_dtype=out
    )


def convolve(operation: Convolve, x: torch.Tensor, states: PassStates, out: torch.dtype) -> torch.Tensor:
    """x (N, C) -> (N, C)."""
    taps, convolution = triton_vector(operation.weight), operation.convolution
    bias = None if operation.bias is None else triton_vector(operation.bias)
    return short_convolution(x, taps, bias, states.arrays[convolution.state], states.sequences, convolution.width, out)
