"""The text by which errors are judged: never what the rounding was fitted to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from kbit.calibration.held_out import held_out_factors, held_out_tokens
from kbit.calibration.request import CalibrationRequest
from kbit.calibration.run import calibration_tokens
from kbit.calibration.sizes import text_shape
from kbit.checkpoint.resolve import open_model
from kbit.models.families import spec_from_config
from kbit.text.datasets import resolve_data
from kbit.text.tokenizer import Tokenizer


def tokens(model: Path, request: CalibrationRequest) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Those of calibration, and those held out."""
    with open_model(str(model)) as source:
        shape = text_shape(spec_from_config(source.config), request.tokens)
        return calibration_tokens(source, request, *shape), held_out_tokens(source, request)


def shared(a: NDArray[np.int64], b: NDArray[np.int64]) -> int:
    """Sequences that are in both."""
    return len({row.tobytes() for row in a} & {row.tobytes() for row in b})


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(str(number) for number in range(2000)), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("wanted", [2048, 1024, 64])
def test_the_model_writes_other_sequences(tiny_model: Path, wanted: int) -> None:
    used, kept = tokens(tiny_model, CalibrationRequest(tokens=wanted))
    assert kept.shape == (-(-len(used) // 8), used.shape[1])
    assert shared(used, kept) == 0


def test_of_a_text_what_calibration_left_over(tiny_model: Path, text: str) -> None:
    used, kept = tokens(tiny_model, CalibrationRequest.of([text], 2048))
    assert len(kept) == len(used) // 8
    assert shared(used, kept) == 0
    every = " ".join(map(str, range(2000)))
    with open_model(str(tiny_model)) as source:
        all_ids = np.array(Tokenizer.from_source(source).encode(every))
    length = used.shape[1]
    sequences = all_ids[: len(all_ids) // length * length].reshape(-1, length)
    assert shared(sequences, kept) == len(kept)


def test_a_text_that_is_used_up_leaves_it_to_the_model(tiny_model: Path, text: str) -> None:
    with open_model(str(tiny_model)) as source:
        there = len(Tokenizer.from_source(source).encode(Path(text).read_text()))
    used, kept = tokens(tiny_model, CalibrationRequest((resolve_data(text),), there // 64 * 64))
    _, written = tokens(tiny_model, CalibrationRequest(tokens=used.size))
    assert np.array_equal(kept, written)


def test_only_the_layers_that_are_asked_for(tiny_model: Path) -> None:
    with open_model(str(tiny_model)) as source:
        every = [found.layer for found in held_out_factors(source, CalibrationRequest(tokens=256), lambda _: False)]
        request = CalibrationRequest(tokens=256)
        last = [found.layer for found in held_out_factors(source, request, lambda layer: layer != every[1])]
    assert every == [*reversed(range(len(every) - 1)), None]
    assert last == [every[1]]
