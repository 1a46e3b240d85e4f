"""A model whose products take what each token's LoRA adapter adds to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, cast

import numpy as np
from numpy.typing import NDArray

from kbit.graph.backend import Definition
from kbit.graph.ops import LowRank, Ops, Vector, Weight, X
from kbit.host.errors import UnsupportedError


@dataclass(frozen=True, eq=False)
class Adapters:
    """Adapters of one model, prepared by its backend.

    Attributes:
        names: in the order of their numbers.
        factors: of every matrix that one of them changes, what each makes of it, or None.
        labels: what these matrices are called, for people.
    """

    names: tuple[str, ...]
    factors: Mapping[Weight, tuple[LowRank | None, ...]]
    labels: Mapping[Weight, str]

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return sum(each.nbytes for of_adapters in self.factors.values() for each in of_adapters if each is not None)


class AdaptedDefinition:
    """A `kbit.graph.backend.Definition` with adapters beside its matrices.

    Args:
        plain: the model without.
        adapters: what is added.

    Raises:
        UnsupportedError: when it is called: an adapter changes a matrix that is more than multiplied by.
    """

    def __init__(self, plain: Definition, adapters: Adapters) -> None:
        self._plain, self._adapters = plain, adapters

    def body(self, ops: Ops[X], ids: X) -> X:
        adapted = _AdaptedOps(ops, self._adapters.factors)
        hidden = self._plain.body(cast(Ops[X], adapted), ids)
        left = [label for weight, label in self._adapters.labels.items() if weight not in adapted.used]
        if left:
            raise UnsupportedError(
                f"an adapter changes {left[0]}, which takes none beside the model: open the adapter's folder as the "
                "model, which adds it to the weights"
            )
        return hidden

    def head(self, ops: Ops[X], hidden: X) -> X:
        return self._plain.head(ops, hidden)

    @property
    def rotation_depends_on_length(self) -> bool:
        return self._plain.rotation_depends_on_length

    def rotation(
        self, positions: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        return self._plain.rotation(positions, lengths)


class _AdaptedOps(Generic[X]):
    """Operations of which products with some matrices are adapted; all others are those of `ops`."""

    def __init__(self, ops: Ops[X], factors: Mapping[Weight, tuple[LowRank | None, ...]]) -> None:
        self._ops, self._factors = ops, factors
        self.used: set[Weight] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def linear(self, weight: Weight, x: X, bias: Vector | None = None) -> X:
        return self._adapted((weight,), x, (self._ops.linear(weight, x, bias),))[0]

    def linear_group(self, weights: Sequence[Weight], x: X, biases: Sequence[Vector | None]) -> tuple[X, ...]:
        return self._adapted(weights, x, self._ops.linear_group(weights, x, biases))

    def _adapted(self, weights: Sequence[Weight], x: X, products: Sequence[X]) -> tuple[X, ...]:
        which = [index for index, weight in enumerate(weights) if weight in self._factors]
        if not which:
            return tuple(products)
        self.used.update(weights[index] for index in which)
        made = self._ops.adapt(x, [products[i] for i in which], [self._factors[weights[i]] for i in which])
        changed = dict(zip(which, made, strict=True))
        return tuple(changed.get(index, product) for index, product in enumerate(products))
