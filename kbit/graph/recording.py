"""Recording: a model's definition written down as a list of operations on symbols.

`Recorder` is an `Ops` whose values are symbols: calling a definition with it computes nothing and leaves the list of
what would be computed. Widths are checked on the way, so a definition that does not fit its weights fails here, with
the operation's name, and not in native code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kbit.graph.experts import Experts, Mixture
from kbit.graph.operations import (
    Activate,
    Adapt,
    Add,
    Attend,
    ByHeads,
    Columns,
    Convolve,
    CrossAttend,
    Embed,
    FitHeads,
    Given,
    Mix,
    Multiply,
    Norm,
    Operation,
    Project,
    Recur,
    Rotate,
    Scale,
    Scan,
    SigmoidGate,
    SoftCap,
    StoreKeys,
    SumParts,
    Symbol,
)
from kbit.graph.ops import Attention, LowRank, Place, Vector, Weight, check_source
from kbit.graph.states import Recurrence, ShortConvolution, StateSpace
from kbit.kernels.activations import ACTIVATIONS


@dataclass
class Recorder:
    """Writes down what a definition does: a `kbit.graph.ops.Ops` on symbols.

    Attributes:
        input: what the definition is called with: token ids (body; width 1) or hidden states (head).
        operations: what it did, in order. `logits` is an ordinary product here.
    """

    input: Symbol
    operations: list[Operation] = field(default_factory=list)

    def embed(self, weight: Weight, ids: Symbol) -> Symbol:
        if ids is not self.input:
            raise ValueError("embed looks up the token ids of the pass and nothing else")
        out = Symbol(weight.shape[1])
        self.operations.append(Embed(weight, out))
        return out

    def look_up(self, weight: Weight, of: Place, first: int = 0) -> Symbol:
        out = Symbol(weight.shape[1])
        self.operations.append(Embed(weight, out, of, first))
        return out

    def given(self, width: int) -> Symbol:
        out = Symbol(width)
        self.operations.append(Given(out))
        return out

    def norm(self, x: Symbol, weight: Vector, eps: float, groups: int = 1, parts: bool = False) -> Symbol:
        if groups > 1:
            _expect("the weight of a norm by groups", weight.shape[0], x.width)
        if weight.shape[0] % groups or x.width % weight.shape[0]:
            raise ValueError(f"the weight of a norm has {weight.shape[0]} features, no divisor of {x.width}")
        if parts:
            _expect("the weight of a norm over processes", weight.shape[0], x.width)
        out = Symbol(x.width)
        self.operations.append(Norm(x, weight, eps, out, groups=groups, parts=parts))
        return out

    def layer_norm(self, x: Symbol, weight: Vector, bias: Vector | None, eps: float) -> Symbol:
        _expect("the weight of a norm", weight.shape[0], x.width)
        if bias is not None:
            _expect("the bias of a norm", bias.shape[0], x.width)
        out = Symbol(x.width)
        self.operations.append(Norm(x, weight, eps, out, bias, centred=True))
        return out

    def add(self, x: Symbol, y: Symbol) -> Symbol:
        _expect("a residual", x.width, y.width)
        out = Symbol(x.width)
        self.operations.append(Add(x, y, out))
        return out

    def multiply(self, x: Symbol, y: Symbol) -> Symbol:
        _expect("a factor of every feature", y.width, x.width)
        out = Symbol(x.width)
        self.operations.append(Multiply(x, y, out))
        return out

    def scale(self, x: Symbol, factor: float | Vector) -> Symbol:
        if not isinstance(factor, float):
            _expect("a factor that is a parameter", factor.shape[0], 1)
        out = Symbol(x.width)
        self.operations.append(Scale(x, factor, out))
        return out

    def soft_cap(self, x: Symbol, cap: float) -> Symbol:
        out = Symbol(x.width)
        self.operations.append(SoftCap(x, cap, out))
        return out

    def columns(self, x: Symbol, first: int, count: int) -> Symbol:
        if first < 0 or count < 1 or first + count > x.width:
            raise ValueError(f"{count} features from {first} on are not among {x.width}")
        out = Symbol(count)
        self.operations.append(Columns(x, first, out))
        return out

    def rotate(self, x: Symbol, head_dim: int, angles: tuple[int, int]) -> Symbol:
        if x.width % head_dim or not 0 <= 2 * (angles[1] - angles[0]) <= head_dim:
            raise ValueError(f"heads of {head_dim} features do not fit {x.width}, or the angles {angles} them")
        out = Symbol(x.width)
        self.operations.append(Rotate(x, head_dim, angles, out))
        return out

    def fit_heads(self, x: Symbol, heads: int, head_dim: int, shared: Symbol | None = None) -> Symbol:
        if x.width % heads or (shared is not None and shared.width > head_dim):
            raise ValueError(f"{heads} heads of {head_dim} features cannot be made of {x.width}, or what they share")
        out = Symbol(heads * head_dim)
        self.operations.append(FitHeads(x, heads, out, shared))
        return out

    def by_heads(self, weight: Weight, x: Symbol, heads: int, first: int, *, backward: bool) -> Symbol:
        rows, columns = weight.shape[0] // heads, weight.shape[1]
        _expect("the matrix of a product by heads", weight.shape[0], rows * heads)
        _expect("the input of a product by heads", x.width, heads * (first + (rows if backward else columns)))
        out = Symbol(heads * (first + columns if backward else rows))
        self.operations.append(ByHeads(x, weight, heads, first, backward, out))
        return out

    def linear(self, weight: Weight, x: Symbol, bias: Vector | None = None) -> Symbol:
        return self._project((weight,), x, (bias,))[0]

    def sum_parts(self, x: Symbol, bias: Vector | None = None) -> Symbol:
        if bias is not None:
            _expect("a bias", bias.shape[0], x.width)
        out = Symbol(x.width)
        self.operations.append(SumParts(x, bias, out))
        return out

    def linear_group(self, weights: Sequence[Weight], x: Symbol, biases: Sequence[Vector | None]) -> tuple[Symbol, ...]:
        return self._project(tuple(weights), x, tuple(biases))

    def logits(self, weight: Weight, x: Symbol, bias: Vector | None = None) -> Symbol:
        return self.linear(weight, x, bias)

    def adapt(
        self, x: Symbol, products: Sequence[Symbol], factors: Sequence[Sequence[LowRank | None]]
    ) -> tuple[Symbol, ...]:
        for product, of_adapters in zip(products, factors, strict=True):
            for each in of_adapters:
                if each is not None:
                    _expect("the input of an adapter", x.width, each.down.shape[1])
                    _expect("the rank of an adapter", each.down.shape[0], each.up.shape[1])
                    _expect("what an adapter adds to", product.width, each.up.shape[0])
        outs = tuple(Symbol(product.width) for product in products)
        self.operations.append(Adapt(x, tuple(products), tuple(map(tuple, factors)), outs))
        return outs

    def self_attention(
        self,
        q: Symbol,
        k: Symbol | None,
        v: Symbol | None,
        attention: Attention,
        key_bias: Vector | None = None,
        sinks: Vector | None = None,
        by_distance: Vector | None = None,
    ) -> Symbol:
        check_source(attention, "self")
        _expect("queries", q.width, attention.heads * attention.head_dim)
        if attention.latent and (k is None or v is not k):
            raise ValueError("the values of latent attention are its keys")
        if k is None or v is None:
            self._expect_written(k, v, attention, key_bias)
        else:
            _expect_keys(k, v, attention)
        if key_bias is not None:
            _expect("the bias of keys", key_bias.shape[0], attention.kv_heads * attention.head_dim)
        if sinks is not None:
            _expect("sinks", sinks.shape[0], attention.heads)
        if by_distance is not None and by_distance.shape[0] % attention.heads:
            raise ValueError(f"what is added by distance ({by_distance.shape[0]}) is not for {attention.heads} heads")
        out = Symbol(q.width)
        self.operations.append(Attend(q, k, v, attention, out, key_bias, sinks, by_distance))
        return out

    def store_keys(self, k: Symbol, v: Symbol, attention: Attention) -> None:
        check_source(attention, "encoder")
        _expect_keys(k, v, attention)
        self.operations.append(StoreKeys(k, v, attention))

    def cross_attention(self, q: Symbol, attention: Attention) -> Symbol:
        check_source(attention, "encoder")
        _expect("queries", q.width, attention.heads * attention.head_dim)
        out = Symbol(q.width)
        self.operations.append(CrossAttend(q, attention, out))
        return out

    def recur(self, x: Symbol, decay: Symbol, write: Symbol, log_rates: Vector, recurrence: Recurrence) -> Symbol:
        _expect("queries, keys and values", x.width, recurrence.width)
        for gate in (decay, write):
            _expect("a gate", gate.width, recurrence.heads)
        _expect("the rates of a recurrence", log_rates.shape[0], recurrence.heads)
        out = Symbol(recurrence.heads * recurrence.value_dim)
        self.operations.append(Recur(x, decay, write, log_rates, recurrence, out))
        return out

    def scan(self, x: Symbol, steps: Symbol, log_rates: Vector, skips: Vector, space: StateSpace) -> Symbol:
        _expect("values, keys and queries", x.width, space.width)
        _expect("steps", steps.width, space.heads)
        for vector in (log_rates, skips):
            _expect("what heads of a state space have one of", vector.shape[0], space.heads)
        out = Symbol(space.heads * space.value_dim)
        self.operations.append(Scan(x, steps, log_rates, skips, space, out))
        return out

    def short_convolution(
        self, x: Symbol, weight: Vector, convolution: ShortConvolution, bias: Vector | None = None
    ) -> Symbol:
        _expect("the input of a convolution", x.width, convolution.features)
        _expect("the weight of a convolution", weight.shape[0], convolution.width * convolution.features)
        if bias is not None:
            _expect("the bias of a convolution", bias.shape[0], convolution.features)
        out = Symbol(x.width)
        self.operations.append(Convolve(x, weight, convolution, out, bias))
        return out

    def activate(self, gate: Symbol, up: Symbol | None, kind: str) -> Symbol:
        if kind not in ACTIVATIONS:
            raise ValueError(f"activation {kind!r} is not one of {', '.join(ACTIVATIONS)}")
        if up is not None:
            _expect("what an activation multiplies", up.width, gate.width)
        out = Symbol(gate.width)
        self.operations.append(Activate(gate, up, kind, out))
        return out

    def sigmoid_gate(self, x: Symbol, gate: Symbol) -> Symbol:
        if gate.width != 1:
            _expect("a gate of every feature", gate.width, x.width)
        out = Symbol(x.width)
        self.operations.append(SigmoidGate(x, gate, out))
        return out

    def experts(self, x: Symbol, logits: Symbol, experts: Experts, mixture: Mixture) -> Symbol:
        _expect("the logits of a router", logits.width, mixture.routing.experts)
        _check_experts(x.width, experts, mixture)
        out = Symbol(x.width)
        self.operations.append(Mix(x, logits, experts, mixture, out))
        return out

    def _expect_written(
        self, k: Symbol | None, v: Symbol | None, attention: Attention, key_bias: Vector | None
    ) -> None:
        """Raise where there are no keys of a layer for an attention that brings none."""
        if k is not None or v is not None or key_bias is not None:
            raise ValueError("attention has keys and values of its own, or neither, nor a bias of keys")
        for operation in self.operations:
            if isinstance(operation, Attend) and operation.k is not None:
                of = operation.attention
                if of.layer == attention.layer:
                    _expect("the head of a layer that is attended to", of.head_dim, attention.head_dim)
                    _expect("what is attended to", of.kv_heads * of.head_dim, attention.kv_heads * attention.head_dim)
                    return
        raise ValueError(f"no earlier attention writes the keys of layer {attention.layer}")

    def _project(self, weights: tuple[Weight, ...], x: Symbol, biases: tuple[Vector | None, ...]) -> tuple[Symbol, ...]:
        for weight, bias in zip(weights, biases, strict=True):
            _expect("the input of a linear", x.width, weight.shape[1])
            if bias is not None:
                _expect("a bias", bias.shape[0], weight.shape[0])
        outs = tuple(Symbol(weight.shape[0]) for weight in weights)
        self.operations.append(Project(x, weights, biases, outs))
        return outs


def _check_experts(width: int, experts: Experts, mixture: Mixture) -> None:
    """Raise unless there are parameters of every expert, all of the same shapes."""
    count, inner = mixture.routing.experts, experts.gates[0].shape[0]
    if mixture.activation not in ACTIVATIONS:
        raise ValueError(f"activation {mixture.activation!r} is not one of {', '.join(ACTIVATIONS)}")
    for matrices, biases, rows, columns in (
        (experts.gates, experts.gate_biases, inner, width),
        (experts.ups, experts.up_biases, inner, width),
        (experts.downs, experts.down_biases, width, inner),
    ):
        if len(matrices) != count or len(biases) != count:
            raise ValueError(f"{len(matrices)} matrices and {len(biases)} biases are not those of {count} experts")
        for matrix, bias in zip(matrices, biases, strict=True):
            _expect("an expert's output", matrix.shape[0], rows)
            _expect("an expert's input", matrix.shape[1], columns)
            if bias is not None:
                _expect("an expert's bias", bias.shape[0], rows)
    if experts.selection_bias is not None:
        _expect("what is added to choose experts", experts.selection_bias.shape[0], count)
    if experts.scales is not None:
        _expect("what experts' weights are multiplied with", experts.scales.shape[0], count)


def _expect_keys(k: Symbol, v: Symbol, attention: Attention) -> None:
    for part in (k, v):
        _expect("keys and values", part.width, attention.kv_heads * attention.head_dim)


def _expect(what: str, width: int, wanted: int) -> None:
    if width != wanted:
        raise ValueError(f"{what} has {width} features where {wanted} are needed")
