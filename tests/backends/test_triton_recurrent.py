"""Recurrent layers on the Triton backend against the reference: whole tiny models, in Triton's interpreter or on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from half_precision_cases import assert_close
from native_cases import random_ids
from triton_model_cases import on, reference, source_of

pytest.importorskip("triton")

from kbit.backends.triton import runner
from kbit.backends.triton.graph import DecodeGraph
from kbit.host.errors import UnsupportedError

pytestmark = pytest.mark.usefixtures("one_thread")

# A delta net with experts, and without; a state space with a gate and factors, with biases; convolutions alone.
FAMILIES = {"qwen3-next": "nf4-b16", "qwen3_5-biases": None, "granite-hybrid": "nf4-b16", "bamba": None, "lfm2": None}
FAMILIES |= {"falcon-h1": None, "falcon-h1-norm": "nf4-b16"}


@pytest.mark.parametrize("name", FAMILIES)
def test_prefill_and_decoding(device: str, name: str) -> None:
    """Two rows: 35 tokens, more than a chunk, then 3 at once (a draft), then one."""
    source = source_of(name, FAMILIES[name])
    ours, theirs = on(device, source), reference(source)
    ids = random_ids(2, 39)
    caches = ours.new_cache(2, 70), theirs.new_cache(2, 70)
    for part in ids.split([35, 3, 1], dim=1):
        assert_close(ours.forward(part, caches[0]), theirs.forward(part, caches[1]), source)
    assert caches[0].lengths.tolist() == [39, 39]


def test_ragged_batches_and_passes(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of different lengths, idle ones among them, and texts that take several passes."""
    monkeypatch.setattr(runner, "PASS_ROWS", 8)
    source = source_of("qwen3_5", None)
    ours, theirs = on(device, source), reference(source)
    caches = ours.new_cache(3, 40), theirs.new_cache(3, 40)
    for index, taken in enumerate([(7, 5, 1), (0, 12, 3), (1, 1, 1), (2, 0, 10)]):
        lengths, ids = torch.tensor(taken), random_ids(3, max(taken), seed=index)
        expected = theirs.forward(ids, caches[1], lengths)
        found = ours.forward(ids, caches[0], lengths)
        for row, length in enumerate(taken):
            if length:
                assert_close(found[row, :length], expected[row, :length], source)


def test_going_back_and_growing(device: str) -> None:
    """To states that were kept; more slots leave those there are as they were; rows are copied."""
    source = source_of("granite-hybrid", None)
    ours, theirs = on(device, source), reference(source)
    caches = ours.new_cache(2, 20), theirs.new_cache(2, 20)
    for decoder, cache in ((ours, caches[0]), (theirs, caches[1])):
        decoder.forward(random_ids(2, 5), cache)
        cache.snapshot()
        decoder.forward(random_ids(2, 3, seed=1), cache)
        cache.truncate(5)
        cache.select(torch.tensor([1, 0, 1]))
        cache.grow(100)
    step = random_ids(3, 2, seed=5)
    assert_close(ours.forward(step, caches[0]), theirs.forward(step, caches[1]), source)


@pytest.mark.parametrize("name", ["qwen3_5", "gpt2"])
def test_captured_decoding(device: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a captured graph computes, with a stand-in that calls the step it was given: states that move from slot to
    slot, and positions that are looked up, are arguments of a replay."""
    captured: list[Any] = []

    class Called(DecodeGraph):
        def __init__(self, step: Any, *others: Any) -> None:
            self._step = step
            captured.append(self)

        def __call__(self, ids: Any, positions: Any, *others: Any) -> torch.Tensor:
            values = [torch.tensor(value, device=device) for value in (ids, positions, *others)]
            lengths = (values[1] + 1).int()
            return self._step(*values[:3], lengths, *values[3:])  # type: ignore[no-any-return]

    monkeypatch.setattr(runner, "DecodeGraph", Called)
    source = source_of(name, None)
    ours, theirs = on(device, source, graphs=True), reference(source)
    caches = ours.new_cache(2, 20), theirs.new_cache(2, 20)
    ids = random_ids(2, 9)
    for part in ids.split([6, 1, 1, 1], dim=1):
        assert_close(ours.forward(part, caches[0]), theirs.forward(part, caches[1]), source)
    assert len(captured) == 1


def test_refuses_wide_keys(device: str) -> None:
    with pytest.raises(UnsupportedError, match="keys of up to 256 features, not 320; use --device cpu"):
        on(device, source_of("qwen3_5", None, linear_key_head_dim=320))
