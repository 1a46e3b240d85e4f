"""Orders of rows, columns and values that a file has otherwise than canonical tensors: what is where.

Written down as sizes when a file is opened, and turned into indices, by numpy, when it is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

from kbit.checkpoint.gguf.metadata import GGUFTensor

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


@dataclass(frozen=True)
class Runs:
    """`run` rows from `first` on, and again as many every `apart` rows."""

    first: int
    run: int
    apart: int

    def places(self, count: int) -> npt.NDArray[np.int64]:
        """Where each of `count` rows is: int64 (count,)."""
        import numpy as np

        wanted = np.arange(count)
        return self.first + wanted // self.run * self.apart + wanted % self.run


@dataclass(frozen=True)
class Tiled:
    """Heads that share a head of keys, `group` of them: one after another canonically, and in the file all first ones,
    then all second ones.

    Attributes:
        before: rows ahead of them, which are in order.
        key_heads: how many heads of keys there are.
        group: heads that share one.
        each: rows of a head.
    """

    before: int
    key_heads: int
    group: int
    each: int

    def places(self, count: int) -> npt.NDArray[np.int64]:
        """Where each of `count` rows is: int64 (count,)."""
        import numpy as np

        head, within = np.divmod(np.arange(count - self.before), self.each)
        key, member = np.divmod(head, self.group)
        stored = self.before + (member * self.key_heads + key) * self.each + within
        return np.concatenate([np.arange(self.before), stored])


@dataclass(frozen=True)
class LastFirst:
    """Heads of so many rows, of which canonically the last ones, `last` of them, come first."""

    head: int
    last: int

    def places(self, count: int) -> npt.NDArray[np.int64]:
        """Where each of `count` rows is: int64 (count,)."""
        import numpy as np

        head, within = np.divmod(np.arange(count), self.head)
        places: npt.NDArray[np.int64] = head * self.head + (within + self.head - self.last) % self.head
        return places


Order: TypeAlias = Runs | Tiled | LastFirst


@dataclass(frozen=True)
class Piece:
    """A canonical tensor in one of a file.

    Attributes:
        name: canonical.
        tensor: or the part of it, of its own shape.
        rows: where its rows are, counted from `tensor`'s first; None: in order.
        columns: likewise.
        decays: it holds -exp of the canonical values.
    """

    name: str
    tensor: GGUFTensor
    rows: Order | None = None
    columns: Order | None = None
    decays: bool = False


def one_after_another(tensor: GGUFTensor, parts: Sequence[tuple[str, int]]) -> list[Piece]:
    """The canonical tensors that a tensor's rows are, each by its name and how many of them it has."""
    found, first, row_bytes = [], 0, tensor.nbytes // tensor.shape[0]
    for name, count in parts:
        place = tensor.offset + first * row_bytes
        rows = replace(tensor, shape=(count, *tensor.shape[1:]), offset=place, nbytes=count * row_bytes)
        found.append(Piece(name, rows))
        first += count
    return found


def runs(places: npt.NDArray[np.int64], most: int) -> Iterator[tuple[int, int, int]]:
    """Rows that lie together: (first of the wanted, first in the file, how many), each of at most `most` rows."""
    import numpy as np

    breaks = np.flatnonzero(np.diff(places) != 1) + 1
    begins, ends = [0, *breaks.tolist()], [*breaks.tolist(), len(places)]
    for begin, end in zip(begins, ends, strict=True):
        for start in range(begin, end, most):
            yield start, int(places[start]), min(most, end - start)
