"""What layers have in place of attention, beside delta nets: which layers do, how large they are, and their states."""

from __future__ import annotations

from dataclasses import dataclass

from kbit.graph.states import ShortConvolution, StateSpace, StateSpec


@dataclass(frozen=True)
class ConvNet:
    """Layers that convolve a few tokens, between two gates (LFM2; `kbit.models.mixers`).

    Attributes:
        layers: per layer, whether it is one.
        features: of the convolution.
        taps: tokens that it takes together.
        bias: whether its linears and the convolution have biases.
    """

    layers: tuple[bool, ...]
    features: int
    taps: int
    bias: bool

    def at(self, layer: int) -> ShortConvolution:
        """What a layer computes, and which state is its own."""
        return ShortConvolution(sum(self.layers[:layer]), self.taps, self.features)

    @property
    def states(self) -> tuple[StateSpec, ...]:
        """The states of all layers."""
        return tuple(self.at(layer).spec for layer, is_one in enumerate(self.layers) if is_one)

    @property
    def inner_width(self) -> int:
        """Features that the last linear reads."""
        return self.features


@dataclass(frozen=True)
class ScanNet:
    """Layers that are Mamba-2's (Dao and Gu 2024; `kbit.models.mixers`).

    Attributes:
        layers: per layer, whether it is one.
        groups: of keys and queries (B and C).
        heads: of values, a multiple of these.
        key_dim, value_dim: features of a group's keys and queries, and of a head's values.
        taps: tokens that the convolution before it takes together.
        bias: whether the convolution has a bias.
        beside: these layers attend, too, and what both make is added to the stream; else they do not.
        norms: runs that the norm of what the state says has; 0: there is none.
        activation: of the convolution.
        gate, parts, steps, out: factors on the gate; on values, keys and queries before the convolution; on steps; and
            on what the last linear makes.
    """

    layers: tuple[bool, ...]
    groups: int
    heads: int
    key_dim: int
    value_dim: int
    taps: int
    bias: bool
    beside: bool = False
    norms: int = 1
    activation: str = "silu"
    gate: float = 1.0
    parts: tuple[float, float, float] = (1.0, 1.0, 1.0)
    steps: float = 1.0
    out: float = 1.0

    def at(self, layer: int) -> tuple[ShortConvolution, StateSpace]:
        """What a layer computes, and which states are its own."""
        state = 2 * sum(self.layers[:layer])
        space = StateSpace(state + 1, self.groups, self.heads, self.key_dim, self.value_dim)
        return ShortConvolution(state, self.taps, space.width), space

    @property
    def states(self) -> tuple[StateSpec, ...]:
        """The states of all layers."""
        own = (self.at(layer) for layer, is_one in enumerate(self.layers) if is_one)
        return tuple(one.spec for pair in own for one in pair)

    @property
    def inner_width(self) -> int:
        """Features that the last linear reads."""
        return self.heads * self.value_dim

    @property
    def part_widths(self) -> tuple[int, int, int]:
        """Features of values, keys and queries."""
        keys = self.groups * self.key_dim
        return self.inner_width, keys, keys


@dataclass(frozen=True)
class Multipliers:
    """Factors inside of layers (Yang et al. 2022, arXiv:2203.03466).

    Attributes:
        output: on what attention's last linear makes.
        gate, down: on what an MLP's gate makes, before its activation, and on what its last linear makes.
    """

    output: float = 1.0
    gate: float = 1.0
    down: float = 1.0
