"""What layers have in place of attention, beside delta nets: which layers do, how large they are, and their states."""

from __future__ import annotations

from dataclasses import dataclass

from kbit.graph.states import ShortConvolution, StateSpec


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
