"""DecodeGraph: one decoding step, captured once as a CUDA graph and replayed without launching from Python."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from kbit.backends.triton.kv_cache import TritonPages
from kbit.graph.pages import PAGE


class Step(Protocol):
    """A decoding step of one token per row."""

    def __call__(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        lengths: torch.Tensor,
        before: torch.Tensor,
        after: torch.Tensor,
        /,
    ) -> torch.Tensor:
        """int64 (B,) each, lengths int32 -> logits (B, V)."""


class DecodeGraph:
    """A step of one new token per row of a cache.

    Arguments go through one small tensor: a replay is one copy to the device and one launch. The step is run once
    before it is captured, since the first launch of a kernel compiles it.

    Args:
        step: it must launch the same kernels on the same memory whatever the values.
        pages: where the step writes.
        slots: int64 (B,), page * PAGE + place of each row's first token.
        after: int64 (B,), slots of states that the first replay will write to; anything of a model without.
        device: a CUDA device, the current one.
        held: what else the step reads and nobody else may keep, tensors or what has some: a graph holds addresses.
    """

    def __init__(
        self,
        step: Step,
        pages: TritonPages,
        slots: NDArray[np.int64],
        after: NDArray[np.int64],
        device: torch.device,
        held: Sequence[object] = (),
    ) -> None:
        self._held = (*held, *pages.keys, *pages.values)
        batch = len(slots)
        self._host = torch.zeros((5, batch), dtype=torch.int64).pin_memory()
        self._values = torch.zeros((5, batch), dtype=torch.int64, device=device)
        ids, positions, places, begun, left = self._values
        # Trying the step out writes a token to position 0 of every row: what is there is kept and put back. States are
        # left where the next step leaves them, too.
        first = torch.from_numpy(np.unique(slots // PAGE)).to(device)
        kept = [(part, part[first]) for part in (*pages.keys, *pages.values)]
        places.copy_(torch.from_numpy(slots))
        begun.fill_(-1)
        left.copy_(torch.from_numpy(after))

        def run() -> torch.Tensor:
            return step(ids, positions, places, (positions + 1).int(), begun, left)

        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        try:
            with torch.cuda.stream(stream):
                run()
            torch.cuda.current_stream(device).wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            # A stream of this device: the one that torch takes otherwise belongs to the first GPU it captured on. Other
            # threads may allocate meanwhile, which the default mode takes for an error of this one.
            with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                self._logits = run()
        finally:  # also where memory ran out: the cache may be used on
            for part, contents in kept:
                part[first] = contents

    def __call__(
        self,
        ids: Sequence[int],
        positions: Sequence[int],
        slots: Sequence[int],
        before: Sequence[int],
        after: Sequence[int],
    ) -> torch.Tensor:
        """Logits (B, V) after one token per row; a copy.

        Args:
            ids: the tokens.
            positions: theirs, which is how many tokens each row had before.
            slots: page * PAGE + place of each.
            before: the slots of the rows' states, -1 for a row without.
            after: where the next ones go.
        """
        # The copy before this one may still be under way where nobody has read the logits since.
        torch.cuda.current_stream(self._values.device).synchronize()
        self._host.copy_(torch.tensor([ids, positions, slots, before, after]))
        self._values.copy_(self._host, non_blocking=True)
        self._graph.replay()
        return self._logits.clone()
