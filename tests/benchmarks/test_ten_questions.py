"""The figures of benchmarks/ten_questions.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import ten_questions


@pytest.mark.parametrize(
    ("ids", "share"),
    [
        ([], 0.0),
        ([1, 2, 3], 0.0),
        ([1, 2, 3, 4, 5, 6], 0.0),
        ([1, 2, 3, 4] * 3, 5 / 9),  # 9 pieces, 4 different ones
        ([7] * 10, 6 / 7),
    ],
)
def test_share_of_pieces_said_before(ids: list[int], share: float) -> None:
    assert ten_questions.repeated_share(ids) == pytest.approx(share)


def test_there_are_ten() -> None:
    assert len(set(ten_questions.QUESTIONS)) == 10
