"""Fusing: a recorded definition in fewer operations, as backends have them.

What adapters add to a product that goes into a sum is added to the sum, so that the product can form it. Sums over
processes and residuals move into the products whose results they are of, norms into the products that read
them, activations into the products they apply to. What a backend does with the result is its own: the native one writes
a program, the Triton one launches the operations one by one.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import fields, replace

from kbit.graph.operations import (
    Activate,
    Adapt,
    Add,
    Norm,
    Operation,
    Project,
    SumParts,
    Symbol,
    reads,
    writes,
)


def fuse(operations: Sequence[Operation], result: Symbol) -> list[Operation]:
    """The same computation in fewer operations.

    Args:
        operations: as recorded.
        result: what is read in the end.
    """
    operations = _adapt_sums(operations, result)
    operations = _fuse_residuals(_fuse_parts(operations, result), result)
    return _fuse_activations(_fuse_norms(operations, result), result)


def without_sums(operations: Sequence[Operation]) -> list[Operation]:
    """The same computation of one process: a sum over processes of what is no product, and without a bias, is that."""
    products = {out for operation in operations if isinstance(operation, Project) for out in operation.outs}
    same: dict[Symbol, Symbol] = {}
    kept: list[Operation] = []
    for operation in operations:
        if isinstance(operation, SumParts) and operation.bias is None and operation.x not in products:
            same[operation.out] = same.get(operation.x, operation.x)
            continue
        changes: dict[str, Symbol] = {}
        for field in fields(operation):
            value = getattr(operation, field.name)
            if isinstance(value, Symbol) and value in same:
                changes[field.name] = same[value]
        kept.append(replace(operation, **changes) if changes else operation)  # type: ignore[arg-type]
    return kept


def _adapt_sums(operations: Sequence[Operation], result: Symbol) -> list[Operation]:
    """A product to which adapters add, and which then is only added to something, is added first: the order of three
    terms is free. (No processes share a model that has adapters.)"""
    uses = _uses(operations, result)
    waiting: dict[Symbol, Adapt] = {}  # by what they make, which the next sum reads
    moved: list[Operation] = []
    for index, operation in enumerate(operations):
        summed = operation.x if isinstance(operation, SumParts) else operation.y if isinstance(operation, Add) else None
        if isinstance(operation, SumParts | Add) and summed in waiting:
            adapt, out = waiting.pop(summed), Symbol(operation.out.width)
            if isinstance(operation, SumParts):
                moved.append(replace(operation, x=adapt.ys[0], out=out))
            else:
                moved.append(replace(operation, y=adapt.ys[0], out=out))
            operation = replace(adapt, ys=(out,), outs=(operation.out,))
        if isinstance(operation, Adapt) and len(operation.outs) == 1 and uses[operation.outs[0]] == 1:
            (made,) = operation.outs
            after = next((each for each in operations[index + 1 :] if made in reads(each)), None)
            if isinstance(after, SumParts) or (isinstance(after, Add) and after.y is made):
                waiting[made] = operation
                continue
        moved.append(operation)
    return moved


def _fuse_parts(operations: Sequence[Operation], result: Symbol) -> list[Operation]:
    """A product of which only the sum over processes is read forms that sum."""
    uses = _uses(operations, result)
    sums = {op.x: op for op in operations if isinstance(op, SumParts) and uses[op.x] == 1}
    fused: list[Operation] = []
    done: set[Operation] = set()
    for operation in operations:
        if operation in done:
            continue
        if isinstance(operation, Project) and operation.outs[0] in sums and len(operation.outs) == 1:
            total = sums[operation.outs[0]]
            if operation.biases[0] is None:
                done.add(total)
                operation = replace(operation, biases=(total.bias,), outs=(total.out,), parts=True)
        fused.append(operation)
    return fused


def _fuse_residuals(operations: Sequence[Operation], result: Symbol) -> list[Operation]:
    """A product that is only added to something adds itself to it, in its place.

    Nobody else may read what is added to once the product is there: its place then holds the sum.
    """
    uses = _uses(operations, result)
    made = {symbol: index for index, operation in enumerate(operations) for symbol in writes(operation)}
    readers: defaultdict[Symbol, list[int]] = defaultdict(list)
    for index, operation in enumerate(operations):
        for symbol in reads(operation):
            readers[symbol].append(index)
    taken: dict[Operation, Add] = {}
    for index, operation in enumerate(operations):
        if not isinstance(operation, Add) or operation.x is result or operation.y not in made:
            continue
        place = made[operation.y]
        product = operations[place]
        if not isinstance(product, Project) or len(product.outs) > 1 or uses[operation.y] > 1:
            continue
        others = [reader for reader in readers[operation.x] if reader != index]
        if made.get(operation.x, -1) < place and all(reader < place for reader in others):
            taken[product] = operation
    added = set(taken.values())
    fused: list[Operation] = []
    for operation in operations:
        if isinstance(operation, Project) and operation in taken:
            operation = replace(operation, outs=(taken[operation].out,), residual=taken[operation].x)
        if operation not in added:
            fused.append(operation)
    return fused


def _fuse_norms(operations: Sequence[Operation], result: Symbol) -> list[Operation]:
    """A norm that a single product reads, as its input, is computed by that product."""
    uses = _uses(operations, result)
    reader = {op.x: index for index, op in enumerate(operations) if isinstance(op, Project)}
    overwritten = {op.residual: index for index, op in enumerate(operations) if isinstance(op, Project)}
    fused: list[Operation] = []
    waiting: dict[Symbol, Norm] = {}
    for operation in operations:
        whole = isinstance(operation, Norm) and operation.weight.shape[0] == operation.x.width
        whole = whole and isinstance(operation, Norm) and operation.groups == 1
        if isinstance(operation, Norm) and whole and uses[operation.out] == 1 and operation.out in reader:
            # Until its reader runs, what it is a norm of must not become a sum.
            if overwritten.get(operation.x, len(operations)) > reader[operation.out]:
                waiting[operation.out] = operation
                continue
        elif isinstance(operation, Project) and operation.x in waiting:
            norm = waiting.pop(operation.x)
            operation = replace(operation, x=norm.x, norm=norm)
        fused.append(operation)
    return fused


def _fuse_activations(operations: Sequence[Operation], result: Symbol) -> list[Operation]:
    """An activation whose arguments one product makes, for it alone, is applied by that product."""
    uses = _uses(operations, result)
    activations = {
        (operation.gate,) if operation.up is None else (operation.gate, operation.up): operation
        for operation in operations
        if isinstance(operation, Activate) and all(uses[symbol] == 1 for symbol in reads(operation))
    }
    fused: list[Operation] = []
    done: set[Operation] = set()
    for operation in operations:
        if operation in done:
            continue
        if (
            isinstance(operation, Project)
            and operation.outs in activations
            and not (operation.residual or operation.parts)
        ):
            activation = activations[operation.outs]
            done.add(activation)
            operation = replace(operation, outs=(activation.out,), activation=activation.kind)
        fused.append(operation)
    return fused


def _uses(operations: Sequence[Operation], result: Symbol) -> Counter[Symbol]:
    """How often each symbol is read."""
    uses = Counter(symbol for operation in operations for symbol in reads(operation))
    uses[result] += 1
    return uses
