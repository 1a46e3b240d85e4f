"""Lowering: a recorded definition becomes a native program.

Three steps, each on the list of operations of a `Recorder`:

    fuse        in fewer operations (`kbit.graph.fuse`)
    place       every symbol gets a buffer; a buffer is free again after the last operation that reads it
    emit        one native instruction per operation

A Llama layer becomes five instructions: norm and q, k, v; attention; o added to the residual; norm, gate, up and
activation; down added to the residual.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kbit.backends.cpu.weight import native_matrix, native_vector
from kbit.graph.fuse import fuse, without_sums
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
    reads,
    writes,
)
from kbit.graph.ops import Vector
from kbit.host.errors import UnsupportedError

if TYPE_CHECKING:
    from kbit._native import Matrix, Program


@dataclass(frozen=True)
class Placement:
    """Where every symbol is.

    Attributes:
        widths: of the buffers.
        buffers: index of each symbol's buffer.
    """

    widths: list[int]
    buffers: dict[Symbol, int]


def place(operations: Sequence[Operation], result: Symbol) -> Placement:
    """Give every symbol a buffer of its width, as few as its neighbours in time allow.

    An operation's outs share no buffer with what it reads, but for a residual: its sum is formed in place. So is what
    adapters add.

    Raises:
        ValueError: a residual is read again after its sum, which the definition must not do (`Ops.linear`).
    """
    last = {symbol: index for index, operation in enumerate(operations) for symbol in reads(operation)}
    last[result] = len(operations)
    widths: list[int] = []
    buffers: dict[Symbol, int] = {}
    free: defaultdict[int, list[int]] = defaultdict(list)
    for index, operation in enumerate(operations):
        # What each out is formed in the place of.
        places: dict[Symbol, Symbol] = {}
        if isinstance(operation, Adapt):
            places = dict(zip(operation.outs, operation.ys, strict=True))
        elif isinstance(operation, Project) and operation.residual is not None:
            places = {operation.outs[0]: operation.residual}
        for taken in places.values():
            if last[taken] > index or reads(operation).count(taken) > 1:
                raise ValueError("a residual is read again once it was added to: the sum has taken its place")
        for out in writes(operation):
            if out in places:
                buffers[out] = buffers[places[out]]
            elif free[out.width]:
                buffers[out] = free[out.width].pop()
            else:
                buffers[out] = len(widths)
                widths.append(out.width)
        for symbol in dict.fromkeys((*reads(operation), *writes(operation))):
            if symbol not in places.values() and last.get(symbol, index) == index:
                free[symbol.width].append(buffers[symbol])
    return Placement(widths, buffers)


def lower_body(program: Program, operations: Sequence[Operation], result: Symbol) -> None:
    """Writes a recorded body into a program: token ids -> hidden states."""
    operations = fuse(without_sums(operations), result)
    placement = place(operations, result)
    numbers = [program.buffer(width) for width in placement.widths]
    at = {symbol: numbers[index] for symbol, index in placement.buffers.items()}
    for operation in operations:
        _emit(program, operation, at)
    program.finish(at[result])


def lower_head(program: Program, operations: Sequence[Operation], result: Symbol, hidden: Symbol) -> None:
    """Writes a recorded head into a program: hidden states -> logits. An encoder's, which is none, changes nothing.

    Raises:
        ValueError: the head is more than an optional norm, one product and its bias, a factor on the logits and their
            soft cap.
    """
    if result is hidden:
        return
    operations = fuse(operations, result)
    factor, cap = 1.0, 0.0
    last = operations[-1]
    if isinstance(last, SoftCap):
        cap, result, operations = last.cap, last.x, operations[:-1]
    last = operations[-1]
    if isinstance(last, Scale) and isinstance(last.factor, float):
        factor, result, operations = last.factor, last.x, operations[:-1]
    if len(operations) == 1 and isinstance(operations[0], Project):
        product = operations[0]
        plain = product.residual is None and product.activation is None
        if plain and product.x is hidden and product.outs == (result,):
            weight, eps, bias, centred = _norm(product.norm)
            own = _optional(product.biases[0])
            program.head(native_matrix(product.weights[0]), weight, eps, bias, centred, factor, cap, own)
            return
    raise ValueError("a head is a norm, or none, and one product, whose logits may be scaled and capped")


def _emit(program: Program, operation: Operation, at: dict[Symbol, int]) -> None:
    if isinstance(operation, Embed):
        program.embed(native_matrix(operation.weight), at[operation.out], operation.of, operation.first)
    elif isinstance(operation, Given):
        program.given(at[operation.out])
    elif isinstance(operation, Norm):
        weight, eps, bias, centred = _norm(operation)
        assert weight is not None
        program.norm(at[operation.x], weight, eps, at[operation.out], bias, centred, operation.groups)
    elif isinstance(operation, Add):
        program.add(at[operation.x], at[operation.y], at[operation.out])
    elif isinstance(operation, Multiply):
        program.multiply(at[operation.x], at[operation.y], at[operation.out])
    elif isinstance(operation, Scale):
        number = operation.factor if isinstance(operation.factor, float) else float(native_vector(operation.factor)[0])
        program.map(at[operation.x], at[operation.out], factor=number)
    elif isinstance(operation, Columns):
        program.columns(at[operation.x], at[operation.out], operation.first)
    elif isinstance(operation, SoftCap):
        program.map(at[operation.x], at[operation.out], cap=operation.cap)
    elif isinstance(operation, Rotate):
        first, stop = operation.angles
        program.rotate(at[operation.x], at[operation.out], operation.head_dim, first, stop - first)
    elif isinstance(operation, FitHeads):
        shared = None if operation.shared is None else at[operation.shared]
        program.fit_heads(at[operation.x], shared, at[operation.out], operation.heads)
    elif isinstance(operation, ByHeads):
        matrix, out = native_matrix(operation.weight), at[operation.out]
        program.by_heads(at[operation.x], matrix, out, operation.heads, operation.first, operation.backward)
    elif isinstance(operation, SumParts):
        raise ValueError("the sum over processes is of a product, and of one that nothing else reads")
    elif isinstance(operation, Attend):
        a = operation.attention
        program.attend(
            at[operation.q],
            None if operation.k is None else at[operation.k],
            None if operation.v is None else at[operation.v],
            at[operation.out],
            a.layer,
            a.heads,
            a.kv_heads,
            a.head_dim,
            a.scale,
            a.window,
            a.positions == "rotary",
            _optional(operation.key_bias),
            a.angles,
            a.soft_cap or 0.0,
            _optional(operation.sinks),
            _optional(operation.by_distance),
            a.latent,
            a.chunked,
        )
    elif isinstance(operation, StoreKeys):
        a = operation.attention
        program.store_keys(at[operation.k], at[operation.v], a.layer, a.heads, a.kv_heads, a.head_dim)
    elif isinstance(operation, CrossAttend):
        a = operation.attention
        program.cross_attend(at[operation.q], at[operation.out], a.layer, a.heads, a.kv_heads, a.head_dim, a.scale)
    elif isinstance(operation, Recur):
        r = operation.recurrence
        x, decay, write = (at[symbol] for symbol in reads(operation))
        rates = native_vector(operation.log_rates)
        program.recur(x, decay, write, rates, at[operation.out], r.state, r.key_heads, r.heads, r.key_dim, r.value_dim)
    elif isinstance(operation, Scan):
        s, rates, skips = operation.space, native_vector(operation.log_rates), native_vector(operation.skips)
        program.scan(
            at[operation.x],
            at[operation.steps],
            rates,
            skips,
            at[operation.out],
            s.state,
            s.groups,
            s.heads,
            s.key_dim,
            s.value_dim,
        )
    elif isinstance(operation, Convolve):
        c = operation.convolution
        taps, bias = native_vector(operation.weight), _optional(operation.bias)
        program.convolve(at[operation.x], taps, at[operation.out], c.state, c.width, bias)
    elif isinstance(operation, Activate):
        up = None if operation.up is None else at[operation.up]
        program.activate(at[operation.gate], up, operation.kind, at[operation.out])
    elif isinstance(operation, SigmoidGate):
        program.sigmoid_gate(at[operation.x], at[operation.gate], at[operation.out])
    elif isinstance(operation, Mix):
        _emit_experts(program, operation, at)
    elif isinstance(operation, Adapt):
        factors = [
            [None if f is None else (native_matrix(f.down), native_matrix(f.up), f.scale) for f in of_out]
            for of_out in operation.factors
        ]
        program.adapt(at[operation.x], [at[out] for out in operation.outs], factors)
    else:
        _emit_product(program, operation, at)


def _emit_product(program: Program, operation: Project, at: dict[Symbol, int]) -> None:
    x, outs, residual = at[operation.x], [at[out] for out in operation.outs], operation.residual
    matrices = [native_matrix(weight) for weight in operation.weights]
    biases = [_optional(bias) for bias in operation.biases]
    weight, eps, bias, centred = _norm(operation.norm)

    def multiply(some: slice, to: list[int], activation: str | None) -> None:
        added = None if residual is None else at[residual]
        program.matmul(x, matrices[some], biases[some], to, weight, eps, activation, added, bias, centred)

    if _share_input(matrices):
        multiply(slice(None), outs, operation.activation)
        return
    # Trellises that are rotated in different ways: each takes x by itself.
    activation = operation.activation
    each = outs if activation is None else [program.buffer(matrix.rows) for matrix in matrices]
    for i, out in enumerate(each):
        multiply(slice(i, i + 1), [out], None)
    if activation is not None:
        program.activate(each[0], each[1], activation, outs[0])


def _share_input(matrices: Sequence[Matrix]) -> bool:
    """Whether one input is rotated once for all of them, or for those that are rotated."""
    rotated = [matrix for matrix in matrices if matrix.rotated]
    return all(matrix.shares_input(rotated[0]) for matrix in rotated)


def _emit_experts(program: Program, operation: Mix, at: dict[Symbol, int]) -> None:
    experts, mixture = operation.experts, operation.mixture
    routing, clamp = mixture.routing, mixture.clamp
    gates, ups, downs = (
        [native_matrix(weight) for weight in weights] for weights in (experts.gates, experts.ups, experts.downs)
    )
    for kind, matrices in (("gate and up", [*gates, *ups]), ("down", downs)):
        if not _share_input(matrices):
            raise UnsupportedError(
                f"the {kind} matrices of a layer's experts are rotated in different ways: quantize them again, in "
                "trellis formats of one -h"
            )
    program.experts(
        at[operation.x],
        at[operation.logits],
        at[operation.out],
        gates,
        ups,
        downs,
        [_optional(bias) for bias in experts.gate_biases],
        [_optional(bias) for bias in experts.up_biases],
        [_optional(bias) for bias in experts.down_biases],
        _optional(experts.selection_bias),
        routing.chosen,
        routing.score,
        routing.normalise,
        routing.scale,
        routing.groups,
        routing.chosen_groups,
        mixture.activation if clamp is None else "silu",
        1.0 if clamp is None else clamp.alpha,
        0.0 if clamp is None else clamp.limit,
        routing.group_score == "best",
        _optional(experts.scales),
        routing.jitter,
        routing.scales_input,
    )


def _optional(vector: Vector | None) -> NDArray[np.float32] | None:
    return None if vector is None else native_vector(vector)


def _norm(norm: Norm | None) -> tuple[NDArray[np.float32] | None, float, NDArray[np.float32] | None, bool]:
    """Weight, epsilon, bias and kind of a norm, as a program takes them."""
    if norm is None:
        return None, 0.0, None, False
    return native_vector(norm.weight), norm.eps, _optional(norm.bias), norm.centred
