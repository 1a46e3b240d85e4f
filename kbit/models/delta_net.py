"""DeltaNet: layers that keep a matrix a head in place of keys and values (Yang et al. 2025), as sizes."""

from __future__ import annotations

from dataclasses import dataclass

from kbit.graph.states import Recurrence, ShortConvolution, StateSpec


@dataclass(frozen=True)
class DeltaNet:
    """Layers that have a gated delta rule in place of attention (`kbit.models.blocks`).

    Attributes:
        layers: per layer, whether it is one.
        key_heads: heads of queries and keys.
        heads: heads of values, a multiple of these.
        key_dim, value_dim: features of a head's keys and queries, and of its values.
        taps: tokens that the convolution before it takes together.
    """

    layers: tuple[bool, ...]
    key_heads: int
    heads: int
    key_dim: int
    value_dim: int
    taps: int

    def at(self, layer: int) -> tuple[ShortConvolution, Recurrence]:
        """What a layer computes, and which states are its own."""
        state = 2 * sum(self.layers[:layer])
        recurrence = Recurrence(state + 1, self.key_heads, self.heads, self.key_dim, self.value_dim)
        return ShortConvolution(state, self.taps, recurrence.width), recurrence

    @property
    def inner_width(self) -> int:
        """Features that the last linear reads."""
        return self.heads * self.value_dim

    @property
    def states(self) -> tuple[StateSpec, ...]:
        """The states of all layers."""
        own = (self.at(layer) for layer, is_one in enumerate(self.layers) if is_one)
        return tuple(one.spec for pair in own for one in pair)
