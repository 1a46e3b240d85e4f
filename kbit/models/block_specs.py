"""What some models have in their blocks or before them: experts, latent attention, an encoder's reading of sound."""

from __future__ import annotations

from dataclasses import dataclass

from kbit.graph.experts import Clamp, Routing


@dataclass(frozen=True)
class ExpertsSpec:
    """The experts of a model.

    Attributes:
        routing: how they are chosen and weighed.
        width: features inside an expert.
        layers: per layer, whether it has experts in place of an MLP.
        shared_width: features inside an MLP beside the experts, through which all tokens go; 0: there is none. Where
            the family names a `shared_switch`, what it makes is multiplied by the sigmoid of that.
        router_bias, bias: whether the router and the experts' linears have biases.
        selection_bias: whether something is added to scores where experts are chosen.
        clamp: the experts' activation, where it is this one.
        beside: layers with experts have an MLP, too, and what both make of the stream is added to it.
    """

    routing: Routing
    width: int
    layers: tuple[bool, ...]
    shared_width: int = 0
    router_bias: bool = False
    bias: bool = False
    selection_bias: bool = False
    clamp: Clamp | None = None
    beside: bool = False


@dataclass(frozen=True)
class LatentSpec:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values are made of one vector per token.

    A head's queries and keys have `ModelSpec.head_dim` features. The first of them, as many as turn, are the same in
    the keys of all heads (`TensorNames.k_shared` makes them); the others, and values, are made of the latent vector.
    The cache holds that vector and those features, or (`expanded`) what every head attends to, keys and values, these
    filled up with zeros.

    Attributes:
        rank: features of that vector, which `TensorNames.kv_a` makes.
        query_rank: of another one (`TensorNames.q_a`), of which queries are made; 0: of the residual stream.
        value_dim: features of a head's values, at most head_dim.
        eps: epsilon of both vectors' norms.
        expanded: what the cache holds; see `kbit.models.latent.compressed`.
    """

    rank: int
    query_rank: int
    value_dim: int
    eps: float
    expanded: bool = True


@dataclass(frozen=True)
class SoundSpec:
    """What an encoder of sound reads in place of tokens (`kbit.models.sound`).

    Attributes:
        bins: features of a frame.
        taps: frames that each of its two convolutions takes together.
        stride: frames of the first that become a position, in the second.
    """

    bins: int
    taps: int = 3
    stride: int = 2
