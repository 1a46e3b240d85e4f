"""TritonRunner: runs a recorded model on the Triton kernels (`kbit.backends.triton.replay`).

The residual stream is float32; what is multiplied is half precision (fp16 or bf16). Only real tokens become rows of a
pass, sequence after sequence. The host knows every length, so nothing waits for the device before the logits are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray

from kbit.backends.rotary import RotaryTable
from kbit.backends.triton.graph import DecodeGraph
from kbit.backends.triton.kv_cache import DeviceTables, TritonPages, slots, triton_pages
from kbit.backends.triton.replay import EncoderTexts, Pass, Replay
from kbit.backends.triton.states import PassStates, TritonStates
from kbit.graph.backend import Array, Definition, Group
from kbit.graph.batch import Batch
from kbit.graph.cache import Cache, encoder_lengths
from kbit.graph.fuse import fuse
from kbit.graph.operations import Attend, Convolve, CrossAttend, Embed, Recur, Scan, Symbol
from kbit.graph.recording import Recorder
from kbit.graph.states import States
from kbit.kernels.triton.product.limits import DECODE_TOKENS
from kbit.kernels.triton.recurrent.sizes import Sequences
from kbit.kernels.triton.target import active

# Tokens that go through the model at once: bounds the memory of activations, and fills any GPU.
PASS_ROWS = 2048


@dataclass(frozen=True, eq=False)
class _Captured:
    """A cache's decoding as a graph, good as long as these are what they were."""

    graph: DecodeGraph
    version: tuple[int, int]  # of the pages, and of the states
    table: torch.Tensor  # the block tables on the device


class TritonRunner:
    """Runs a model (a `kbit.graph.backend.Runner`). Calls from several threads take turns.

    Args:
        definition: the model. Its body and head are called once; only its rotation is asked for again.
        device: where the kernels run.
        dtype: of what is multiplied: float16 or bfloat16.
        graphs: replay the decoding of a token as a CUDA graph; not with a group.
        group: the processes that share the model, if several do.
        activations: what the layers' products with many tokens round these to, "int8" or "fp8"; "" for not at all. The
            head's are never rounded: generating text, it has a row per sequence.

    Raises:
        UnsupportedError: a weight's format cannot be multiplied with such activations.
    """

    def __init__(
        self,
        definition: Definition,
        device: torch.device,
        dtype: torch.dtype,
        *,
        graphs: bool,
        group: Group | None = None,
        activations: str = "",
    ) -> None:
        self._device = device
        self._graphs = graphs
        self._group = group
        self._rotary = RotaryTable(definition)
        self._lock = Lock()
        body = Recorder(Symbol(1))
        hidden = definition.body(body, body.input)
        self._body = Replay(fuse(body.operations, hidden), body.input, hidden, dtype, group, activations)
        masks = {op.attention.mask for op in body.operations if isinstance(op, Attend)} or {"causal"}
        if len(masks) > 1:
            raise ValueError(f"all attentions of a model have one mask, not {' and '.join(sorted(masks))}")
        self._mask = masks.pop()
        self._crosses = any(isinstance(op, CrossAttend) for op in body.operations)
        self._recurs = any(isinstance(op, Recur | Scan | Convolve) for op in body.operations)
        self._learned = any(isinstance(op, Embed) and op.of == "positions" for op in body.operations)
        head = Recorder(Symbol(hidden.width))
        logits = definition.head(head, head.input)
        self._head = Replay(fuse(head.operations, logits), head.input, logits, dtype)
        self._device_tables: WeakKeyDictionary[Cache, DeviceTables] = WeakKeyDictionary()
        self._captured: WeakKeyDictionary[Cache, _Captured] = WeakKeyDictionary()
        empty = torch.empty((0, 0), dtype=torch.float32, device=device)
        self._angles: tuple[torch.Tensor, torch.Tensor] = (empty, empty)

    @torch.no_grad()
    def hidden(self, batch: Batch, cache: Cache) -> torch.Tensor:
        pages = triton_pages(cache)
        states = States.of(cache, TritonStates) if self._recurs else None
        with self._lock, active(self._device):
            parts = []
            for piece in batch.passes(self._mask, PASS_ROWS):
                own = None if states is None else states.of_piece(batch, piece)
                x = self._body(self._upload(piece.ids), self._pass(piece, cache, pages, own))
                if len(piece.wanted) < len(piece):
                    x = x[self._upload(piece.wanted)]
                parts.append(x)
        cache.advance(batch.counts)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @torch.no_grad()
    def logits(self, hidden: Array) -> torch.Tensor:
        x = torch.as_tensor(hidden).to(self._device)
        with self._lock, active(self._device):
            parts = [self._head(part, None) for part in torch.split(x, PASS_ROWS)]
            out = parts[0] if len(parts) == 1 else torch.cat(parts)  # a copy of 2048 rows may be a gigabyte
            if self._group is not None:
                out = self._group.from_first(out)
        return out

    @torch.no_grad()
    def forward(self, batch: Batch, cache: Cache) -> torch.Tensor:
        # Capturing pays where the same cache comes again and again, not for one made for a single pass.
        decodes = cache.private and bool((batch.counts == 1).all()) and len(batch.wanted) == len(batch)
        if self._graphs and not self._rotary.by_length and decodes and not self._crosses:
            with self._lock, active(self._device):
                out = self._graph(batch, cache)
            cache.advance(batch.counts)
            return out
        return self.logits(self.hidden(batch, cache))

    def extend(self, ids: Sequence[int], cache: Cache, last_only: bool) -> NDArray[np.float32]:
        batch = Batch.of([ids], cache.lengths, "last" if last_only else "all")
        rows: NDArray[np.float32] = self.forward(batch, cache).cpu().numpy()
        return rows

    def _tables(self, cache: Cache) -> torch.Tensor:
        """The cache's block tables, on the device."""
        tables = self._device_tables.get(cache)
        if tables is None:
            tables = self._device_tables[cache] = DeviceTables(cache.tables, self._device)
        return tables.update(cache.tables)

    def _graph(self, batch: Batch, cache: Cache) -> torch.Tensor:
        """Logits (B, V) after one token for each row of a cache, by the graph that was captured for it."""
        pages, table = triton_pages(cache), self._tables(cache)
        captured = self._captured.get(cache)
        states = States.of(cache, TritonStates) if self._recurs else None
        version = (pages.version, 0 if states is None else states.store.version)
        none = np.full(cache.batch, -1)
        before, after = (none, none) if states is None else (states.before, states.after)
        if captured is None or captured.version != version or captured.table is not table:
            capacity = cache.capacity
            cos, sin = self._table(capacity)

            bounds = self._upload(batch.bounds.astype(np.int32))
            arrays = [] if states is None else list(states.store.arrays)

            def run(
                ids: torch.Tensor,
                at: torch.Tensor,
                slots: torch.Tensor,
                lengths: torch.Tensor,
                before: torch.Tensor,
                after: torch.Tensor,
            ) -> torch.Tensor:
                own = PassStates(arrays, Sequences(bounds, before, after, 1)) if arrays else None
                step = Pass(
                    pages, table, slots, cos, sin, at, at[:, None], None, lengths, 1, capacity, places=at, states=own
                )  # fmt: skip
                return self._head(self._body(ids, step), None)

            first = slots(cache.tables, batch.sequences, np.zeros_like(batch.positions))
            held = (cos, sin, table, bounds, *arrays, *self._body.held(), *self._head.held())
            graph = DecodeGraph(run, pages, first, after.astype(np.int64), self._device, held)
            captured = self._captured[cache] = _Captured(graph, version, table)
        places = slots(cache.tables, batch.sequences, batch.positions)
        return captured.graph(
            batch.ids.tolist(), batch.positions.tolist(), places.tolist(), before.tolist(), after.tolist()
        )

    def _pass(self, batch: Batch, cache: Cache, pages: TritonPages, states: States[TritonStates] | None) -> Pass:
        """The tokens of a batch and where they stand."""
        if self._rotary.by_length:
            tables = self._rotary.of_spans(batch.starts, batch.lengths)
            cos, sin = (self._upload(table) for table in tables)
            angles = np.arange(len(batch))
        else:
            (cos, sin), angles = self._table(int(batch.lengths.max())), batch.positions.astype(np.int64)
        longest = int(batch.counts.max())
        uniform = 0 < longest <= DECODE_TOKENS and int(batch.counts.min()) == longest
        whole = self._crosses or self._mask != "causal"
        positions = batch.positions.astype(np.int64).reshape(len(batch.counts), -1) if uniform else None
        bounds = self._upload(batch.bounds.astype(np.int32)) if whole or self._recurs or not uniform else None
        own = None
        if states is not None:
            assert bounds is not None
            before, after = self._upload(states.before), self._upload(states.after)
            own = PassStates(states.store.arrays, Sequences(bounds, before, after, longest))
        return Pass(
            pages,
            self._tables(cache),
            self._upload(slots(cache.tables, batch.sequences, batch.positions)),
            cos,
            sin,
            self._upload(angles),
            None if positions is None else self._upload(positions),
            bounds,
            self._upload(batch.lengths.astype(np.int32)),
            longest,
            int(batch.lengths.max()),
            self._texts(batch, cache) if self._crosses else None,
            self._upload(batch.positions.astype(np.int64)) if self._learned else None,
            None if batch.types is None else self._upload(batch.types),
            own,
            None if batch.features is None else self._upload(batch.features),
        )

    def _texts(self, batch: Batch, cache: Cache) -> EncoderTexts:
        """What cross attention reads."""
        encoder, lengths = encoder_lengths(cache, batch.counts)
        return EncoderTexts(triton_pages(encoder), self._tables(encoder), self._upload(lengths.astype(np.int32)))

    def _table(self, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The rotary table by position on the device, for positions below `stop` at least."""
        if len(self._angles[0]) < stop:
            cos, sin = self._rotary.by_position(stop)
            self._angles = (self._upload(cos), self._upload(sin))
        return self._angles

    def _upload(self, array: NDArray[np.int64] | NDArray[np.int32] | NDArray[np.float32]) -> torch.Tensor:
        values = torch.from_numpy(np.ascontiguousarray(array))
        if self._device.type == "cpu":
            return values
        return values.pin_memory().to(self._device, non_blocking=True)
