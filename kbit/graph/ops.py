"""Ops: the few operations a model is made of.

A model is a definition (`Definition`): Python that calls operations (`Ops`) on values it cannot look into. A backend
decides what such a value is. The reference backend's are tensors, and the definition computes; the native backend's are
symbols, and the definition is written down, once, as a program that is then replayed without Python. So a new device
means a new backend and no change to a model, and every backend runs the same definition.

Operations are cut where they have a meaning of their own; which of them one kernel computes together is decided when a
recording is fused (`kbit.graph.fuse`). Two are larger than that: rotating, appending to the cache and attending are one
call, and weights that share an input are multiplied in one call.

Several processes may share a model (`SplitBackend`). What each then has after a product with its part of the input
features is a part of a sum, until `sum_parts` says that the sum is wanted.

Dimension names: B batch rows, T new tokens per row, H query heads, H_kv key/value heads, D head dimension, K input
features, N output features, V vocabulary. Activations are in whatever float type the backend computes in; only logits
are promised to be float32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias, TypeVar

from kbit.host.errors import UnsupportedError

if TYPE_CHECKING:
    from kbit.graph.experts import Experts, Mixture
    from kbit.graph.states import Recurrence, ShortConvolution, StateSpace

X = TypeVar("X")

# What is known of a token besides its id.
Place: TypeAlias = Literal["positions", "types"]


class Weight(ABC):
    """A matrix as one backend keeps it. Only the backend that prepared it can look inside."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(N, K)."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes it occupies in memory."""


class Vector(Protocol):
    """A norm's weight or a bias as one backend keeps it (`Backend.prepare_vector`). Only that backend looks inside."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(N,)."""

    @property
    def nbytes(self) -> int:
        """Bytes it occupies in memory."""


@dataclass(frozen=True)
class Attention:
    """What a layer's attention is.

    A backend refuses, by name, what it does not run (`refuse_attention`).

    Attributes:
        layer: where its keys and values are in the cache: the layer's index. Layers whose keys nobody asks for after
            the pass, as where all tokens of a text go through at once, may share one.
        heads: H.
        kv_heads: H_kv, a divisor of H.
        head_dim: D.
        scale: multiplies the dot products.
        window: tokens a query sees at most, itself included, or None for all: before it, and with mask "bidirectional"
            as many after it.
        mask: which tokens a query sees. "causal": those up to itself. "bidirectional": all of its text, which therefore
            goes through the model at once. "prefix": all of a given beginning (`Batch.prefixes`), which therefore goes
            through at once, and those up to itself. "cross": all of the encoder's.
        source: whose keys and values these are: of the same tokens ("self"), or of an encoder's text ("encoder"), which
            are in a cache of their own (`Cache.encoder`).
        positions: how the dot products know positions: "rotary" (q and k turned), or "none" (the input has them).
        angles: with "rotary", the columns [first, stop) of the pass's rotary tables that turn q and k; None: all.
        soft_cap: c, scores s become c tanh(s / c) before the mask; None: they stay.
        latent: values are the turned keys themselves, and kept once. One key/value head then serves all heads.
        chunked: the window does not slide (Llama 4): a text is cut into stretches as long as it, and a query sees the
            tokens of its own stretch, up to itself.
    """

    layer: int
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None
    mask: Literal["causal", "bidirectional", "prefix", "cross"] = "causal"
    source: Literal["self", "encoder"] = "self"
    positions: Literal["rotary", "none"] = "rotary"
    angles: tuple[int, int] | None = None
    soft_cap: float | None = None
    latent: bool = False
    chunked: bool = False

    def __post_init__(self) -> None:
        if self.window is not None and self.mask not in ("causal", "bidirectional"):
            raise ValueError(f"{self.mask} attention has no window")
        if self.chunked and (self.window is None or self.mask != "causal"):
            raise ValueError("chunks are of causal attention with a window")
        if (self.mask == "cross") != (self.source == "encoder"):
            raise ValueError(f"the keys of {self.mask} attention are not those of source {self.source!r}")
        if self.source == "encoder" and self.positions != "none":
            raise ValueError("positions in two texts have no distance: cross attention does not rotate")
        if self.angles is not None and self.positions != "rotary":
            raise ValueError("attention that does not rotate has no angles")
        if self.soft_cap is not None and not self.soft_cap > 0:
            raise ValueError(f"a soft cap of {self.soft_cap} is not positive")


def check_source(attention: Attention, source: Literal["self", "encoder"]) -> None:
    """Raise where an operation is given the attention of another one.

    Raises:
        ValueError: it is not of this source.
    """
    if attention.source != source:
        raise ValueError(f"attention with keys of source {attention.source!r} where {source!r} is computed")


def refuse_attention(attention: Attention, backend: str, **known: tuple[str, ...]) -> None:
    """Raise where an attention is of a kind that a backend does not run.

    Args:
        backend: its name.
        known: the values it runs, by attribute of Attention.

    Raises:
        UnsupportedError: naming backend, attribute and value.
    """
    for attribute, values in known.items():
        value = getattr(attention, attribute)
        if value not in values:
            raise UnsupportedError(
                f"the {backend} backend has no attention with {attribute} {value!r}, only {' or '.join(values)}"
            )


class Ops(Protocol[X]):
    """Operations on values of type X, whose rows are the tokens of one forward pass.

    Which tokens these are (positions, rows, the cache) belongs to the pass, not to the definition: an Ops knows it.
    """

    def embed(self, weight: Weight, ids: X) -> X:
        """Rows of a weight prepared with lookup=True: token ids -> (..., K)."""

    def look_up(self, weight: Weight, of: Place, first: int = 0) -> X:
        """Rows of a weight prepared with lookup=True by what else is known of a pass's tokens: (..., K).

        Args:
            weight: (N, K).
            of: "positions", or token "types" (`Batch.types`).
            first: the row of position 0, or of type 0.
        """

    def given(self, width: int) -> X:
        """What a pass brings of its tokens in place of ids (`Batch.features`): (..., width)."""

    def norm(self, x: X, weight: Vector, eps: float, groups: int = 1, parts: bool = False) -> X:
        """RMS normalisation over runs of D features, all K or a head's: x (..., K), weight (D,) -> (..., K).

        Several groups: over each of so many runs, for which the weight (K,) has numbers of their own. Parts: the run is
        longer, every process has some features of it, and the mean is over all.
        """

    def layer_norm(self, x: X, weight: Vector, bias: Vector | None, eps: float) -> X:
        """LayerNorm over the features, with or without a bias: x (..., K), weight (K,), bias (K,) -> (..., K)."""

    def add(self, x: X, y: X) -> X:
        """x + y: (..., K)."""

    def multiply(self, x: X, y: X) -> X:
        """x y, feature by feature: (..., K)."""

    def scale(self, x: X, factor: float | Vector) -> X:
        """factor x: (..., K). A factor that is a parameter is a vector of one number."""

    def columns(self, x: X, first: int, count: int) -> X:
        """Features [first, first + count) of x: (..., K) -> (..., count)."""

    def soft_cap(self, x: X, cap: float) -> X:
        """cap tanh(x / cap): (..., K)."""

    def rotate(self, x: X, head_dim: int, angles: tuple[int, int]) -> X:
        """Every head turned to its token's position, where that is not for attention to do: (..., H D) -> (..., H D).

        Args:
            x: queries or keys.
            head_dim: D.
            angles: columns [first, stop) of the pass's rotary tables; 2 (stop - first) features of a head turn.
        """

    def fit_heads(self, x: X, heads: int, head_dim: int, shared: X | None = None) -> X:
        """Every head of x made D wide: its first features, and zeros where it has fewer: (..., H d) -> (..., H D).

        Args:
            x: features of H heads.
            heads: H.
            head_dim: D.
            shared: (..., S), what all heads begin with, before their own.
        """

    def by_heads(self, weight: Weight, x: X, heads: int, first: int, *, backward: bool) -> X:
        """Every head's features times its own rows of a matrix, W_h (N, K) of H such: what latent attention has in
        place of keys and values of every head.

        Args:
            weight: (H N, K).
            x: (..., H (first + K)); backward (..., H (first + N)).
            heads: H.
            first: features of a head before those that are multiplied.
            backward: with W_h and not its transpose; the first features then stay in front.

        Returns:
            (..., H N), x_h W_h^T; backward (..., H (first + K)), the first features and x_h W_h.
        """

    def linear(self, weight: Weight, x: X, bias: Vector | None = None) -> X:
        """x W^T + b: x (..., K) -> (..., N)."""

    def sum_parts(self, x: X, bias: Vector | None = None) -> X:
        """The sum of every process's x, plus b: (..., N). x is a product of a matrix that is cut by its columns.

        The bias is added here, once, and not by the product, of which every process has a part.
        """

    def linear_group(self, weights: Sequence[Weight], x: X, biases: Sequence[Vector | None]) -> tuple[X, ...]:
        """Several linears of one input (q, k, v; gate, up): x (..., K) -> (..., N_i) each."""

    def self_attention(
        self,
        q: X,
        k: X | None,
        v: X | None,
        attention: Attention,
        key_bias: Vector | None = None,
        sinks: Vector | None = None,
        by_distance: Vector | None = None,
    ) -> X:
        """Attention of a pass's tokens to themselves and to what is in the cache.

        q and k are rotated to their positions, k and v written to the cache, and every query attends to the tokens of
        its row that the mask and the window let it see.

        Args:
            q: (..., H D).
            k: (..., H_kv D); None: keys and values are those that an earlier attention of the pass has written for the
                same layer (`Attention.layer`).
            v: (..., H_kv D); None with k; k itself where `attention.latent`.
            attention: sizes, scale, mask and window.
            key_bias: (H_kv D), what k has from its projection's bias. A cache of codes may store keys without it.
            sinks: (H,), a score of each head that stands in the softmax's sum beside those of keys, and has no value.
            by_distance: (H (2 R + 1)), what is added to every head's scaled scores, for a key's position less its
                query's, which counts as -R or R beyond these.

        Returns:
            (..., H D).
        """

    def store_keys(self, k: X, v: X, attention: Attention) -> None:
        """Leaves an encoder's keys and values, as they are, in the pass's cache, for `cross_attention` of a decoder.

        Args:
            k: (..., H_kv D).
            v: (..., H_kv D).
            attention: the decoder's, whose source is "encoder".
        """

    def cross_attention(self, q: X, attention: Attention) -> X:
        """Attention of a pass's tokens to all tokens of their row's encoder text: (..., H D) -> (..., H D).

        Args:
            q: queries, used as they are.
            attention: sizes and scale; its source is "encoder".
        """

    def recur(self, x: X, decay: X, write: X, log_rates: Vector, recurrence: Recurrence) -> X:
        """A gated delta rule over the tokens of each row, from the state that the row has
        (`kernels.reference_recurrent.gated_delta`).

        Args:
            x: queries, keys and values side by side, (..., 2 G D_k + H D_v).
            decay: (..., H), how fast the state fades, before a softplus.
            write: (..., H), how much of a token goes in, before a sigmoid.
            log_rates: (H,), logarithms of what the softplus is multiplied by.
            recurrence: sizes, and which state.

        Returns:
            (..., H D_v).
        """

    def scan(self, x: X, steps: X, log_rates: Vector, skips: Vector, space: StateSpace) -> X:
        """A state space over the tokens of each row, from the state that the row has
        (`kernels.reference_recurrent.state_space`).

        Args:
            x: values, keys and queries side by side, (..., H D_v + 2 G D_k).
            steps: (..., H), how much of a token goes in and how fast the state fades, before a softplus.
            log_rates: (H,), logarithms of what steps are multiplied by to say how fast.
            skips: (H,), how much of a token's values goes past the state.
            space: sizes, and which state.

        Returns:
            (..., H D_v).
        """

    def short_convolution(self, x: X, weight: Vector, convolution: ShortConvolution, bias: Vector | None = None) -> X:
        """Every feature's weighted sum over its last W tokens, the row's earlier ones included.

        Args:
            x: (..., C).
            weight: (W C,), the oldest token's C factors first.
            convolution: sizes, and which state.
            bias: (C,), added to the sums.

        Returns:
            (..., C).
        """

    def activate(self, gate: X, up: X | None, kind: str) -> X:
        """act(gate) * up, or act(gate): (..., K). `kind` is one of kernels.activations.ACTIVATIONS."""

    def sigmoid_gate(self, x: X, gate: X) -> X:
        """sigmoid(gate) x: x (..., K), gate (..., 1) or (..., K) -> (..., K)."""

    def experts(self, x: X, logits: X, experts: Experts, mixture: Mixture) -> X:
        """The weighted sum of what each token's chosen experts make of it (`kernels.reference_experts`).

        Args:
            x: (..., K).
            logits: of the router, (..., E).
            experts: their parameters.
            mixture: how they are chosen and weighed, and what they compute.

        Returns:
            (..., K).
        """

    def logits(self, weight: Weight, x: X, bias: Vector | None = None) -> X:
        """x (..., K) against a weight (V, K), perhaps plus a bias (V,) -> float32 (..., V)."""
