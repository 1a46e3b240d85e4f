"""Fusing: a recorded definition in fewer operations, as backends have them.

Norms move into the products that read them, activations into the products they apply to. What a backend does with the
result is its own: the native one writes a program, the Triton one launches the operations one by one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from kbit.graph.recording import Activate, Norm, Operation, Project, Symbol, reads


def fuse(operations: Sequence[Operation], result: Symbol) -> list[Operation]:
    """The same computation in fewer operations.

    Args:
        operations: as recorded.
        result: what is read in the end.
    """
    return _fuse_activations(_fuse_norms(operations, result), result)


def _fuse_norms(operations: Sequence[Operation], result: Symbol) -> list[Operation]:
    """A norm that a single product reads, as its input, is computed by that product."""
    uses = _uses(operations, result)
    reader = {op.x: index for index, op in enumerate(operations) if isinstance(op, Project)}
    overwritten = {op.residual: index for index, op in enumerate(operations) if isinstance(op, Project)}
    fused: list[Operation] = []
    waiting: dict[Symbol, Norm] = {}
    for operation in operations:
        if isinstance(operation, Norm) and uses[operation.out] == 1 and operation.out in reader:
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
        if isinstance(operation, Project) and operation.residual is None and operation.outs in activations:
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
