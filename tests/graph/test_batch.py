"""Batch: positions and owners of tokens, and that pieces are the same tokens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kbit.graph.batch import Batch

sequences = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 200)), min_size=1, max_size=6)


def batch_of(parts: list[tuple[int, int]], wanted: object = "last") -> Batch:
    """(new tokens, tokens before) of each sequence."""
    tokens = [[100 * b + t for t in range(count)] for b, (count, _) in enumerate(parts)]
    return Batch.of(tokens, [start for _, start in parts], wanted)  # type: ignore[arg-type]


def test_where_tokens_belong() -> None:
    batch = batch_of([(2, 5), (0, 7), (3, 0)])
    assert len(batch) == 5
    assert batch.ids.tolist() == [0, 1, 200, 201, 202]
    assert batch.sequences.tolist() == [0, 0, 2, 2, 2]
    assert batch.positions.tolist() == [5, 6, 0, 1, 2]
    assert batch.bounds.tolist() == [0, 2, 2, 5]
    assert batch.lengths.tolist() == [7, 7, 3]
    assert batch.wanted.tolist() == [1, 4]
    assert (batch.sequences.dtype, batch.positions.dtype) == (np.int32, np.int32)


def test_what_is_wanted() -> None:
    assert batch_of([(2, 0), (3, 0)], "all").wanted.tolist() == [0, 1, 2, 3, 4]
    assert batch_of([(2, 0), (3, 0)], [0, 3]).wanted.tolist() == [0, 3]
    assert batch_of([(0, 4)]).wanted.tolist() == []
    with pytest.raises(ValueError, match="2 sequences"):
        Batch.of([[1], [2]], [0])


@given(sequences, st.integers(1, 7))
def test_pieces_are_the_same_tokens(parts: list[tuple[int, int]], most: int) -> None:
    whole = batch_of(parts, "all")
    pieces = list(whole.pieces(most))
    assert all(1 <= len(piece) <= most for piece in pieces)
    for field in ("ids", "sequences", "positions"):
        joined = [value for piece in pieces for value in getattr(piece, field).tolist()]
        assert joined == getattr(whole, field).tolist()
    last = batch_of(parts)
    wanted = [piece.ids[piece.wanted].tolist() for piece in last.pieces(most)]
    assert [token for part in wanted for token in part] == last.ids[last.wanted].tolist()
    starts = whole.starts
    for piece in pieces:
        assert piece.starts.tolist() == starts.tolist()
        starts = piece.lengths
    assert starts.tolist() == whole.lengths.tolist()
