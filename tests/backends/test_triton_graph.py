"""DecodeGraph without a GPU: what it hands to the step and to torch, and what it leaves in the cache.

torch.cuda's streams and graphs are stand-ins here; a replay runs the step again, as a GPU would its kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from kbit.backends.triton.graph import DecodeGraph
from kbit.backends.triton.kv_cache import TritonPages


class Stream:
    def __init__(self, *device: torch.device) -> None:
        pass

    def wait_stream(self, other: Stream) -> None:
        pass

    def synchronize(self) -> None:
        pass


class Steps:
    """A step that writes into the cache, as a model does, and answers with its arguments."""

    def __init__(self, pages: TritonPages) -> None:
        self._pages = pages
        self.seen: list[list[list[int]]] = []
        self.replay: Callable[[], object] = lambda: None

    def __call__(self, *arguments: torch.Tensor) -> torch.Tensor:
        ids, positions, slots, lengths, before, after = arguments
        assert lengths.dtype == torch.int32
        for pages in (*self._pages.keys, *self._pages.values):
            pages[slots // 64] = 99
        self.seen.append([values.tolist() for values in arguments])
        self.replay = lambda: self(ids, positions, slots, (positions + 1).int(), before, after)
        return torch.zeros(len(ids), 5)


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What torch.cuda.graph was called with."""
    calls: list[dict[str, Any]] = []

    def graph(graph: object, **options: Any) -> Any:
        calls.append(options)
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    return calls


def test_capture_and_replay(captures: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    store = TritonPages(2, 1, 16, 6, device="cpu")
    for pages in (*store.keys, *store.values):
        pages.copy_(torch.arange(pages.numel()).view(pages.shape) % 97)
    before = [pages.clone() for pages in (*store.keys, *store.values)]
    steps, table = Steps(store), torch.zeros(4)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: type("Graph", (), {"replay": lambda graph: steps.replay()})())
    first = np.array([0, 128, 256])
    after = np.array([4, 2, 9])
    graph = DecodeGraph(steps, store, first, after, torch.device("cpu"), held=(table,))

    # Once before it is captured and once for that, at position 0 of every row; the cache is as it was. States come from
    # nowhere and go to where the next step's go.
    assert steps.seen == 2 * [[[0, 0, 0], [0, 0, 0], [0, 128, 256], [1, 1, 1], [-1, -1, -1], [4, 2, 9]]]
    assert all(torch.equal(*pair) for pair in zip(before, (*store.keys, *store.values), strict=True))
    # A graph holds addresses: the tables that the runner may replace must stay.
    assert any(table is held for value in vars(graph).values() if isinstance(value, tuple) for held in value)
    # On a stream of its own device, and undisturbed by other threads.
    (options,) = captures
    assert isinstance(options["stream"], Stream)
    assert options["capture_error_mode"] == "thread_local"

    assert graph([7, 8, 9], [70, 0, 5], [70, 128, 261], [3, -1, 8], [4, 2, 9]).shape == (3, 5)
    assert steps.seen[2] == [[7, 8, 9], [70, 0, 5], [70, 128, 261], [71, 1, 6], [3, -1, 8], [4, 2, 9]]
