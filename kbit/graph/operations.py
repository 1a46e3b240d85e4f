"""What a recorded model is made of: operations on symbols, and which symbols each reads and writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kbit.graph.experts import Experts, Mixture
from kbit.graph.ops import Attention, LowRank, Place, Vector, Weight
from kbit.graph.states import Recurrence, ShortConvolution, StateSpace


@dataclass(frozen=True, eq=False)
class Symbol:
    """One value of the recorded pass: a row of `width` features for every token. It is itself and equals no other."""

    width: int


@dataclass(frozen=True, eq=False)
class Embed:
    """out = rows of a matrix; the ids are the pass's, or its tokens' positions or types, from row `first` on."""

    weight: Weight
    out: Symbol
    of: Literal["tokens"] | Place = "tokens"
    first: int = 0


@dataclass(frozen=True, eq=False)
class Given:
    """out = what the pass brings of its tokens (`Batch.features`)."""

    out: Symbol


@dataclass(frozen=True, eq=False)
class Norm:
    """out = RMS norm of x, by runs of features as wide as the weight, or over every process's; or, centred, its
    LayerNorm, perhaps biased. With several groups there are so many runs in the weight, too."""

    x: Symbol
    weight: Vector
    eps: float
    out: Symbol
    bias: Vector | None = None
    centred: bool = False
    groups: int = 1
    parts: bool = False


@dataclass(frozen=True, eq=False)
class Add:
    """out = x + y."""

    x: Symbol
    y: Symbol
    out: Symbol


@dataclass(frozen=True, eq=False)
class Multiply:
    """out = x y, feature by feature."""

    x: Symbol
    y: Symbol
    out: Symbol


@dataclass(frozen=True, eq=False)
class Scale:
    """out = factor x, a number, or a parameter of one number."""

    x: Symbol
    factor: float | Vector
    out: Symbol


@dataclass(frozen=True, eq=False)
class SoftCap:
    """out = cap tanh(x / cap)."""

    x: Symbol
    cap: float
    out: Symbol


@dataclass(frozen=True, eq=False)
class Columns:
    """out = the features of x from `first` on, as many as out is wide."""

    x: Symbol
    first: int
    out: Symbol


@dataclass(frozen=True, eq=False)
class Rotate:
    """out = x with heads turned by the columns [first, stop) of the pass's rotary tables."""

    x: Symbol
    head_dim: int
    angles: tuple[int, int]
    out: Symbol


@dataclass(frozen=True, eq=False)
class FitHeads:
    """out = every head of x made as wide as out's, after what all share: cut, or filled with zeros."""

    x: Symbol
    heads: int
    out: Symbol
    shared: Symbol | None = None


@dataclass(frozen=True, eq=False)
class ByHeads:
    """out = every head's features of x, from `first` on, times its own rows of a matrix, or by their transpose."""

    x: Symbol
    weight: Weight
    heads: int
    first: int
    backward: bool
    out: Symbol


@dataclass(frozen=True, eq=False)
class SumParts:
    """out = the sum of every process's x, plus a bias."""

    x: Symbol
    bias: Vector | None
    out: Symbol


@dataclass(frozen=True, eq=False)
class Project:
    """outs[i] = (residual +) norm(x) W_i^T + b_i; or one out = act(the first) * the second, or act(the only one).

    The recorder writes neither norm, activation, residual nor parts: `kbit.graph.fuse` puts them in where a product can
    take them over.

    Attributes:
        norm: applied to x first.
        activation: kind, applied to the products.
        residual: added, and the sum may be formed in its place; only where there is one out.
        parts: the product is added up over the processes before bias and residual; only where there is one out.
    """

    x: Symbol
    weights: tuple[Weight, ...]
    biases: tuple[Vector | None, ...]
    outs: tuple[Symbol, ...]
    residual: Symbol | None = None
    norm: Norm | None = None
    activation: str | None = None
    parts: bool = False


@dataclass(frozen=True, eq=False)
class Adapt:
    """outs[i] = ys[i] + what every token's adapter makes of x, which may be formed in the place of ys[i].

    Attributes:
        factors: of every out, of every adapter.
    """

    x: Symbol
    ys: tuple[Symbol, ...]
    factors: tuple[tuple[LowRank | None, ...], ...]
    outs: tuple[Symbol, ...]


@dataclass(frozen=True, eq=False)
class Attend:
    """out = attention of the pass's tokens, after rotating q and k and appending k and v to the cache; without k and v,
    to what an earlier operation has appended for the same layer.

    Attributes:
        key_bias: what every k has in it, for caches that store keys without it.
        sinks: scores of heads beside those of keys.
        by_distance: what is added to scores.
    """

    q: Symbol
    k: Symbol | None
    v: Symbol | None
    attention: Attention
    out: Symbol
    key_bias: Vector | None = None
    sinks: Vector | None = None
    by_distance: Vector | None = None


@dataclass(frozen=True, eq=False)
class StoreKeys:
    """An encoder's k and v go to the cache, for the decoder's attention that is described."""

    k: Symbol
    v: Symbol
    attention: Attention


@dataclass(frozen=True, eq=False)
class CrossAttend:
    """out = attention of the pass's tokens to their encoder texts."""

    q: Symbol
    attention: Attention
    out: Symbol


@dataclass(frozen=True, eq=False)
class Recur:
    """out = a gated delta rule over the pass's tokens, on from their sequences' states."""

    x: Symbol
    decay: Symbol
    write: Symbol
    log_rates: Vector
    recurrence: Recurrence
    out: Symbol


@dataclass(frozen=True, eq=False)
class Scan:
    """out = a state space over the pass's tokens, on from their sequences' states."""

    x: Symbol
    steps: Symbol
    log_rates: Vector
    skips: Vector
    space: StateSpace
    out: Symbol


@dataclass(frozen=True, eq=False)
class Convolve:
    """out = every feature's weighted sum over its sequence's last few tokens."""

    x: Symbol
    weight: Vector
    convolution: ShortConvolution
    out: Symbol
    bias: Vector | None = None


@dataclass(frozen=True, eq=False)
class Activate:
    """out = act(gate) * up, or act(gate)."""

    gate: Symbol
    up: Symbol | None
    kind: str
    out: Symbol


@dataclass(frozen=True, eq=False)
class SigmoidGate:
    """out = sigmoid(gate) x, gate of width 1 or of x's."""

    x: Symbol
    gate: Symbol
    out: Symbol


@dataclass(frozen=True, eq=False)
class Mix:
    """out = the weighted sum of what the experts that logits choose make of x."""

    x: Symbol
    logits: Symbol
    experts: Experts
    mixture: Mixture
    out: Symbol


Operation = (
    Embed
    | Given
    | Norm
    | Add
    | Multiply
    | Scale
    | SoftCap
    | Columns
    | Rotate
    | FitHeads
    | ByHeads
    | SumParts
    | Project
    | Adapt
    | Attend
    | StoreKeys
    | CrossAttend
    | Recur
    | Scan
    | Convolve
    | Activate
    | SigmoidGate
    | Mix
)


def reads(operation: Operation) -> tuple[Symbol, ...]:
    """The symbols an operation needs, a residual last."""
    if isinstance(operation, Embed | Given):
        return ()
    if isinstance(operation, Attend):
        if operation.k is None or operation.v is None:
            return (operation.q,)
        return (operation.q, operation.k, operation.v)
    if isinstance(operation, Adapt):
        return (operation.x, *operation.ys)
    if isinstance(operation, StoreKeys):
        return (operation.k, operation.v)
    if isinstance(operation, CrossAttend):
        return (operation.q,)
    if isinstance(operation, Recur):
        return (operation.x, operation.decay, operation.write)
    if isinstance(operation, Scan):
        return (operation.x, operation.steps)
    if isinstance(operation, Activate):
        return (operation.gate,) if operation.up is None else (operation.gate, operation.up)
    if isinstance(operation, Add | Multiply):
        return (operation.x, operation.y)
    if isinstance(operation, SigmoidGate):
        return (operation.x, operation.gate)
    if isinstance(operation, FitHeads):
        return (operation.x,) if operation.shared is None else (operation.x, operation.shared)
    if isinstance(operation, Mix):
        return (operation.x, operation.logits)
    if isinstance(operation, Project) and operation.residual is not None:
        return (operation.x, operation.residual)
    return (operation.x,)


def writes(operation: Operation) -> tuple[Symbol, ...]:
    """The symbols an operation makes."""
    if isinstance(operation, StoreKeys):
        return ()
    return operation.outs if isinstance(operation, Project | Adapt) else (operation.out,)
