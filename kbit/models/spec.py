"""ModelSpec: everything that distinguishes one decoder from another, checked and typed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kbit.graph.states import StateSpec
from kbit.models.block_specs import ExpertsSpec, LatentSpec, SoundSpec
from kbit.models.delta_net import DeltaNet
from kbit.models.layer_shapes import LayerShape
from kbit.models.mixer_specs import ConvNet, Multipliers, ScanNet
from kbit.models.rope_spec import MAX_CONTEXT as MAX_CONTEXT
from kbit.models.rope_spec import RopeSpec as RopeSpec
from kbit.models.task_heads import TaskHead
from kbit.models.tensor_names import TensorNames

if TYPE_CHECKING:
    from kbit.graph.pages import PerLayer

# Tables of sines: as in Marian, and as in fairseq.
Sinusoids = Literal["marian", "fairseq"]

# The square of a relu, x relu(x), as an activation of plain MLPs.
SQUARED = "relu2"

# A parabola above zero and an exponential below, with learned factors, of plain MLPs (arXiv 2411.13010).
XIELU = "xielu"

NO_MULTIPLIERS = Multipliers()

# Attributes of a ModelSpec that say what layers have in place of attention.
RECURRENT = ("delta", "conv", "scan")


@dataclass(frozen=True)
class ModelSpec:
    """A transformer of layers of attention, with rotary positions, and a gated MLP.

    Attributes:
        family: model_type of the configuration.
        vocab_size: V.
        hidden_size: width of the residual stream.
        intermediate_size: width of the MLP.
        layers: number of blocks.
        heads: query heads H.
        kv_heads: key/value heads H_kv, a divisor of H.
        head_dim: D.
        norm_eps: epsilon of every norm.
        activation: one of kernels.activations.ACTIVATIONS, SQUARED or XIELU.
        rope: rotary embedding; how far it reaches is the model's context length.
        windows: per layer, tokens a query sees at most (itself included), or None for all.
        qkv_bias, output_bias, mlp_bias, head_bias: which linears have biases.
        tied_embeddings: the head is the embedding matrix.
        names: where the tensors are, and which norms there are.
        norm: kind of every norm.
        norm_bias: whether norms have biases; only LayerNorms do.
        mask: which tokens a query sees.
        rotated: per layer, whether queries and keys turn with their positions; empty: in all.
        window_rope: rotary embedding of layers with a window, where it is another one.
        qk_norm: what the norms of queries and keys (`names.q_norm`) take together: each "head", or the "whole" row.
        norm_rotated: these norms come after the rotation.
        score_scale: factor on the dot products; None: D^-0.5.
        score_cap: c of c tanh(s / c), applied to scores; None: they stay.
        logit_cap: the same, of logits.
        embedding_multiplier, residual_multiplier, logit_multiplier: factors on embeddings, on what a block adds to the
            residual stream, and on logits.
        query_temperature: (b, n): a query at position p is multiplied by 1 + b ln(1 + floor(p / n)); None: it is not.
        experts: of layers that have some; None: no layer has.
        delta: of layers with a gated delta rule in place of attention; None: no layer has.
        conv: of layers with a convolution in place of attention; None: no layer has.
        scan: of layers with a state space in place of attention; None: no layer has.
        position_rows: rows of the table of positions (`names.positions`), 0 where there is none.
        first_position: its row of position 0.
        sinusoids: which table of sines it is (`kbit.models.sinusoids`), where it is computed; a copy may be stored.
        types: rows of the table of token types (`names.types`), 0 where there is none.
        distances: buckets and the largest distance of `kbit.models.distances`, where there are such tables: one for
            all layers, or one each, as `names.distances` says.
        sloped: scores fall with the distance, by a slope of each head (`kbit.models.distances`).
        slope_factor: a factor on these slopes.
        unnormed: layers that lack the norm before attention that the others have.
        parallel: attention and MLP read the same stream, and what both make is added to it; without a norm of its own
            the MLP reads what attention's norm made.
        task: what it computes of hidden states; None: the logits of the next token.
        latent: keys and values are made of a latent vector; None: of the residual stream.
        shapes: of layers that differ from each other; empty: none does. kv_heads, head_dim and intermediate_size are
            then those of layers with a window.
        value_norm: values have an RMS norm by heads, without a weight.
        layer_features: features that a second embedding has for every layer, 0 where there is none.
        layer_tokens: its rows, at least V.
        layer_multiplier: a factor on them.
        encoder: of an encoder-decoder, whose decoder this then is, the other half.
        multipliers: factors inside of layers.
        mixing: per layer, whether it attends or recurs, where others are an MLP alone; empty: every layer has both.
        key_bias: whether keys have the bias that queries and values have.
        chunked: windows do not slide (`kbit.graph.ops.Attention.chunked`).
        unturned_temperature: (b, n): likewise, of layers that do not rotate, (p + 1) / n in place of p / n.
        key_norms: queries and keys that rotate have RMS norms by heads without weights.
        embedding_size: width of embeddings and of what the head reads, between which and the residual stream there are
            projections (`names.project_in`, `names.project_out`); 0: that of the stream.
        sound: it reads sound; None: tokens.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    activation: str
    rope: RopeSpec
    windows: tuple[int | None, ...]
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    tied_embeddings: bool
    names: TensorNames
    norm: Literal["rms", "layer"] = "rms"
    norm_bias: bool = False
    mask: Literal["causal", "bidirectional", "prefix"] = "causal"
    rotated: tuple[bool, ...] = ()
    window_rope: RopeSpec | None = None
    qk_norm: Literal["head", "whole"] = "head"
    norm_rotated: bool = False
    score_scale: float | None = None
    score_cap: float | None = None
    logit_cap: float | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logit_multiplier: float = 1.0
    query_temperature: tuple[float, int] | None = None
    experts: ExpertsSpec | None = None
    delta: DeltaNet | None = None
    conv: ConvNet | None = None
    scan: ScanNet | None = None
    position_rows: int = 0
    first_position: int = 0
    sinusoids: Sinusoids | None = None
    types: int = 0
    distances: tuple[int, int] | None = None
    sloped: bool = False
    slope_factor: float = 1.0
    unnormed: tuple[int, ...] = ()
    parallel: bool = False
    head_bias: bool = False
    task: TaskHead | None = None
    latent: LatentSpec | None = None
    shapes: tuple[LayerShape, ...] = ()
    value_norm: bool = False
    layer_features: int = 0
    layer_tokens: int = 0
    layer_multiplier: float = 1.0
    encoder: ModelSpec | None = None
    key_bias: bool = True
    sound: SoundSpec | None = None
    multipliers: Multipliers = NO_MULTIPLIERS
    mixing: tuple[bool, ...] = ()
    embedding_size: int = 0
    chunked: bool = False
    unturned_temperature: tuple[float, int] | None = None
    key_norms: bool = False

    @property
    def embedding_width(self) -> int:
        """Features of an embedding, and of what the head reads."""
        return self.embedding_size or self.hidden_size

    @property
    def stacked_layers(self) -> int:
        """The layers there are, an encoder's among them."""
        return self.layers + (0 if self.encoder is None else self.encoder.layers)

    def has_experts(self, layer: int) -> bool:
        """Whether a layer has experts."""
        return self.experts is not None and self.experts.layers[layer]

    def shape(self, layer: int) -> LayerShape:
        """The heads of a layer, the width of its MLP, and whose keys it attends to."""
        if self.shapes:
            return self.shapes[layer]
        return LayerShape(self.kv_heads, self.head_dim, self.intermediate_size, layer)

    @property
    def value_dim(self) -> int:
        """Features of a head's values, as the last linear of attention reads them."""
        return self.head_dim if self.latent is None else self.latent.value_dim

    def recurs(self, layer: int) -> bool:
        """Whether a layer has something recurrent in place of attention."""
        return self.scan_beside is None and any(net.layers[layer] for net in self.recurrent)

    @property
    def scan_beside(self) -> ScanNet | None:
        """State spaces that all layers have beside attention."""
        return self.scan if self.scan is not None and self.scan.beside else None

    def attends(self, layer: int) -> bool:
        """Whether a layer attends."""
        return not self.recurs(layer) and (not self.mixing or self.mixing[layer])

    def has_mlp(self, layer: int) -> bool:
        """Whether a layer has an MLP, or experts."""
        return not self.mixing or not self.mixing[layer]

    @property
    def recurrent(self) -> tuple[DeltaNet | ConvNet | ScanNet, ...]:
        """What layers have in place of attention: one kind at most."""
        return tuple(net for net in (getattr(self, name) for name in RECURRENT) if net is not None)

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """The layers that attend."""
        return tuple(layer for layer in range(self.layers) if self.attends(layer))

    @property
    def states(self) -> tuple[StateSpec, ...]:
        """What is kept of a sequence besides keys and values."""
        return tuple(state for net in self.recurrent for state in net.states)

    @property
    def state_bytes(self) -> int:
        """Bytes of these."""
        return sum(state.nbytes for state in self.states)

    @property
    def inner_widths(self) -> tuple[int, ...]:
        """The features inside the MLPs and the experts there are, each kind once."""
        experts = self.experts
        widths = tuple(dict.fromkeys(shape.width for shape in self.shapes)) or (self.intermediate_size,)
        if experts is None:
            return widths
        dense = () if all(experts.layers) and not experts.beside else widths
        return (*dense, experts.width, *((experts.shared_width,) if experts.shared_width else ()))

    @property
    def inner_features(self) -> int:
        """The features inside MLPs and experts that a token has in all layers."""
        widths = [self.shape(layer).width if self.has_mlp(layer) else 0 for layer in range(self.layers)]
        if self.experts is None:
            return sum(widths)
        each = self.experts.routing.chosen * self.experts.width + self.experts.shared_width
        beside = self.experts.beside
        return sum(
            (each if has else 0) + (width if beside or not has else 0)
            for width, has in zip(widths, self.experts.layers, strict=True)
        )

    @property
    def continues_text(self) -> bool:
        """Whether it predicts the token after a text, which `kbit run` and its like ask for."""
        return self.task is None and self.mask != "bidirectional" and self.encoder is None

    @property
    def has_logits(self) -> bool:
        """Whether hidden states become logits of the vocabulary."""
        return self.task is None or self.task.kind == "mask"

    @property
    def context_length(self) -> int:
        """Longest text the model is meant for, in tokens, the extension by RoPE scaling included. The decoder itself
        goes on beyond it; generation and evaluation do not."""
        return self.rope.context_length

    @property
    def max_positions(self) -> int:
        """The context length under the name that generation asks for; not `max_position_embeddings`, which is
        rope.max_positions."""
        return self.context_length

    @property
    def longest_in_pieces(self) -> int:
        """Longest text that may go through the model piece by piece, over a cache: 0 where every token sees all others,
        and see `RopeSpec.depends_on_length`."""
        if self.mask == "bidirectional":
            return 0
        dependent = [rope.constant_up_to for rope in self.ropes if rope.depends_on_length]
        return min([self.context_length, *dependent])

    @property
    def begins_anew_beyond(self) -> int | None:
        """Length of a text beyond which all of its keys are others, once (longrope): its cache is filled anew there."""
        longrope = self.rope.kind == "longrope" and self.rope.depends_on_length
        return self.rope.constant_up_to if longrope else None

    @property
    def ropes(self) -> tuple[RopeSpec, ...]:
        """The rotary embeddings there are: of all layers, or of those without and those with a window."""
        return (self.rope,) if self.window_rope is None else (self.rope, self.window_rope)

    @property
    def several_rotations(self) -> bool:
        """Whether the rotary tables hold more than one rotation, side by side."""
        return len(self.ropes) > 1 or self.query_temperature is not None or self.unturned_temperature is not None

    @property
    def cache_layers(self) -> int:
        """Layers whose keys and values are kept: one after another the same, where every text goes through at once; and
        the first ones, where others attend to theirs."""
        if self.mask == "bidirectional":
            return 1
        if self.shapes:
            return sum(shape.source == layer for layer, shape in enumerate(self.shapes))
        return max(1, len(self.attention_layers))

    def cache_layer(self, layer: int) -> int:
        """Where among these the keys and values are that a layer attends to."""
        before = sum(self.attends(other) for other in range(self.shape(layer).source))
        return min(before, self.cache_layers - 1)

    @property
    def cache_heads(self) -> tuple[PerLayer, PerLayer]:
        """H_kv and D of the layers whose keys and values are kept, as pools of pages take them."""
        if self.keeps_latents:
            return self.cache_sizes[0]
        if not self.shapes:
            return self.kv_heads, self.head_dim
        kept = self.shapes[: self.cache_layers]
        return tuple(shape.kv_heads for shape in kept), tuple(shape.head_dim for shape in kept)

    @property
    def keeps_latents(self) -> bool:
        """Whether the cache holds latent vectors: one head of keys, which are values, too."""
        return self.latent is not None and not self.latent.expanded

    @property
    def cache_sizes(self) -> tuple[tuple[int, int], ...]:
        """(H_kv, D) of what is attended to, each kind once."""
        if self.latent is None or self.latent.expanded:
            return self.attention_sizes
        return ((1, self.rope.dim + self.latent.rank),)

    def cache_size(self, layer: int) -> tuple[int, int]:
        """(H_kv, D) of what a layer attends to."""
        shape = self.shape(layer)
        return self.cache_sizes[0] if self.keeps_latents else (shape.kv_heads, shape.head_dim)

    @property
    def attention_sizes(self) -> tuple[tuple[int, int], ...]:
        """(H_kv, D) of the layers, each kind once."""
        return tuple(dict.fromkeys((shape.kv_heads, shape.head_dim) for shape in self.shapes)) or (
            (self.kv_heads, self.head_dim),
        )

    @property
    def attention_scale(self) -> float:
        """Factor on the dot products."""
        return 1.0 / math.sqrt(self.head_dim) if self.score_scale is None else self.score_scale

    def expected_tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor the model needs, by name, with its shape. A tied head is not listed."""
        from kbit.models.params import parameters

        return {parameter.name: parameter.shape for parameter in parameters(self)}
