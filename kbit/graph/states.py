"""States of fixed size: what a recurrent layer knows of a sequence, in place of keys and values of every token.

A state is never written over. A pass reads the state that a sequence has (a slot of a store) and leaves the next one in
another slot, which becomes the sequence's when the pass is done (`kbit.graph.pages.BlockTable.advance`). So a pass that
fails leaves nothing half-done, and to keep a state, to go back to it or to share it is to count who uses its slot, and
no copy: slots are the pages of a pool of their own.

The arrays of `StateStore` are numpy's and the same for every backend on the CPU. (It is loaded where there are any: a
model's sizes are asked for without.) A GPU's backend has a store of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kbit.graph.batch import Batch
    from kbit.graph.cache import Cache


S = TypeVar("S")


@dataclass(frozen=True)
class StateSpec:
    """One state of a layer; a layer may have several.

    Attributes:
        shape: of a sequence's, without the batch.
        dtype: numpy's name of the numbers' type.
    """

    shape: tuple[int, ...]
    dtype: str = "float32"

    @property
    def nbytes(self) -> int:
        import numpy as np

        return prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Recurrence:
    """A gated delta rule (Yang et al. 2025): a matrix per head that forgets, is corrected, and is asked.

    Attributes:
        state: index of its `StateSpec` among the model's.
        key_heads: G, heads of queries and keys, each of which is that of H / G heads of values, one after another.
        heads: H, heads of values and states.
        key_dim: features of a key and of a query, D_k.
        value_dim: features of a value, D_v.
    """

    state: int
    key_heads: int
    heads: int
    key_dim: int
    value_dim: int

    def __post_init__(self) -> None:
        if self.heads % self.key_heads:
            raise ValueError(f"{self.key_heads} heads of keys are not shared alike by {self.heads} heads of values")

    @property
    def width(self) -> int:
        """Features of a token's queries, keys and values together."""
        return 2 * self.key_heads * self.key_dim + self.heads * self.value_dim

    @property
    def spec(self) -> StateSpec:
        return StateSpec((self.heads, self.key_dim, self.value_dim))


@dataclass(frozen=True)
class StateSpace:
    """A state space layer (Mamba-2; Dao and Gu 2024, arXiv 2405.21060): a matrix per head that fades and is added to.

    Attributes:
        state: index of its `StateSpec` among the model's.
        groups: G, heads of keys and queries (B and C), each of which is that of H / G heads, one after another.
        heads: H, heads of values (x) and states.
        key_dim: features of a key and of a query, D_k.
        value_dim: features of a value, D_v.
    """

    state: int
    groups: int
    heads: int
    key_dim: int
    value_dim: int

    def __post_init__(self) -> None:
        if self.heads % self.groups:
            raise ValueError(f"{self.groups} groups of keys are not shared alike by {self.heads} heads")

    @property
    def width(self) -> int:
        """Features of a token's values, keys and queries together."""
        return 2 * self.groups * self.key_dim + self.heads * self.value_dim

    @property
    def spec(self) -> StateSpec:
        return StateSpec((self.heads, self.key_dim, self.value_dim))


@dataclass(frozen=True)
class ShortConvolution:
    """A causal convolution of every feature by itself over the last few tokens.

    Attributes:
        state: index of its `StateSpec` among the model's: the inputs of the tokens before.
        width: tokens that an output depends on, W, at least 2.
        features: C.
    """

    state: int
    width: int
    features: int

    def __post_init__(self) -> None:
        if self.width < 2:
            raise ValueError("a convolution over one token has no state")

    @property
    def spec(self) -> StateSpec:
        return StateSpec((self.width - 1, self.features))


class StateStore:
    """Slots of states (a `kbit.graph.pages.PageStore`, a slot being a page).

    Args:
        specs: the model's states.
        count: slots, at least 1.

    Attributes:
        arrays: per state (count, *shape).
    """

    def __init__(self, specs: Sequence[StateSpec], count: int) -> None:
        import numpy as np

        self.specs = tuple(specs)
        self.arrays: list[NDArray[Any]] = [np.zeros((count, *spec.shape), dtype=spec.dtype) for spec in specs]

    @property
    def count(self) -> int:
        """Slots."""
        return len(self.arrays[0])

    @property
    def page_bytes(self) -> int:
        """Bytes of a slot."""
        return sum(spec.nbytes for spec in self.specs)

    def resize(self, count: int) -> None:
        """Memory for `count` slots; those there are keep their contents."""
        import numpy as np

        for index, old in enumerate(self.arrays):
            self.arrays[index] = np.zeros((count, *old.shape[1:]), dtype=old.dtype)
            self.arrays[index][: len(old)] = old

    def copy(self, source: int, target: int) -> None:
        """Makes slot `target` the same as `source`."""
        for array in self.arrays:
            array[target] = array[source]


@dataclass(frozen=True, eq=False)
class States(Generic[S]):
    """The states that a pass reads and writes.

    Attributes:
        store: where they are.
        before: int32 (B,), the slot of each sequence; -1 for one that begins, whose states are zeros.
        after: int32 (B,), where the next ones go; -1 for one without new tokens.
    """

    store: S
    before: NDArray[np.int32]
    after: NDArray[np.int32]

    @classmethod
    def of(cls, cache: Cache, kind: type[S]) -> States[S]:
        """Those of a cache's rows, for which room was made.

        Args:
            cache: whose.
            kind: of the backend's store.

        Raises:
            TypeError: the cache has none, or another backend's.
        """
        import numpy as np

        states = cache.pool.states
        if states is None or not isinstance(states.store, kind):
            raise TypeError("a recurrent model's cache has a pool of states")
        before = np.array([row.state for row in cache.rows], dtype=np.int32)
        return cls(states.store, before, np.array([row.next_state for row in cache.rows], dtype=np.int32))

    def of_piece(self, whole: Batch, piece: Batch) -> States[S]:
        """For a piece of a batch: a sequence whose tokens are in an earlier one goes on from what that left."""
        import numpy as np

        begun = piece.starts > whole.starts
        return States(self.store, np.where(begun, self.after, self.before).astype(np.int32), self.after)
