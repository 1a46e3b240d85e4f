"""NativeRunner: replays a recorded model for any number of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from kbit import _native
from kbit.backends.cpu.kv_cache import native_pages
from kbit.backends.cpu.lowering import lower_body, lower_head
from kbit.backends.rotary import RotaryTable
from kbit.graph.backend import Array, Definition
from kbit.graph.batch import Batch
from kbit.graph.cache import Cache, encoder_lengths
from kbit.graph.operations import (
    Attend,
    Convolve,
    CrossAttend,
    Recur,
    Scan,
    Symbol,
)
from kbit.graph.recording import Recorder
from kbit.graph.states import States, StateStore

# Tokens that go through the program at once: bounds the memory of its buffers.
PASS_ROWS = 512

_ONE = [1]


@dataclass(frozen=True, eq=False)
class Recorded:
    """A model as a program.

    Attributes:
        program: body and head.
        hidden_width: features of a hidden state.
        vocabulary: V; of an encoder 0, as it has no head.
        mask: which tokens of its text one sees.
        crosses: it attends to an encoder's texts.
        recurs: it has states of fixed size.
    """

    program: _native.Program
    hidden_width: int
    vocabulary: int
    mask: str
    crosses: bool
    recurs: bool


def record(definition: Definition, context: _native.Context, compute: str) -> Recorded:
    """Writes a definition down as a native program. Its body and head are called once, and never again.

    Raises:
        ValueError: the definition does what a program cannot (see `kbit.backends.cpu.lowering`).
    """
    program = _native.Program(context, compute)
    body = Recorder(Symbol(1))
    hidden = definition.body(body, body.input)
    lower_body(program, body.operations, hidden)
    head = Recorder(Symbol(hidden.width))
    logits = definition.head(head, head.input)
    lower_head(program, head.operations, logits, head.input)
    masks = {op.attention.mask for op in body.operations if isinstance(op, Attend)} or {"causal"}
    if len(masks) > 1:
        raise ValueError(f"all attentions of a program have one mask, not {' and '.join(sorted(masks))}")
    crosses = any(isinstance(op, CrossAttend) for op in body.operations)
    recurs = any(isinstance(op, Recur | Scan | Convolve) for op in body.operations)
    vocabulary = 0 if logits is head.input else logits.width
    return Recorded(program, hidden.width, vocabulary, masks.pop(), crosses, recurs)


class NativeRunner:
    """Runs a program on batches (a `kbit.graph.backend.Runner`).

    Calls from several threads take turns, as they share the program's buffers.

    Args:
        definition: the model; only its rotation is asked for again.
        recorded: the model as a program.
    """

    def __init__(self, definition: Definition, recorded: Recorded) -> None:
        self._program = recorded.program
        self._rotary = RotaryTable(definition)
        self._lock = Lock()
        self._hidden_width = recorded.hidden_width
        self._vocabulary = recorded.vocabulary
        self._mask = recorded.mask
        self._crosses = recorded.crosses
        self._recurs = recorded.recurs
        self._plain = bool(recorded.vocabulary) and not (recorded.crosses or recorded.recurs)
        # Arguments of a pass of one token: filled in, never allocated.
        self._id = np.zeros(1, dtype=np.int64)
        self._position = np.zeros(1, dtype=np.int32)
        self._zero = np.zeros(1, dtype=np.int32)
        self._first_row = np.zeros(1, dtype=np.int64)

    def forward(self, batch: Batch, cache: Cache) -> NDArray[np.float32]:
        if not self._vocabulary:
            return self.hidden(batch, cache)
        out = np.empty((len(batch.wanted), self._vocabulary), dtype=np.float32)
        self._run(batch, cache, out, logits=True)
        return out

    def hidden(self, batch: Batch, cache: Cache) -> NDArray[np.float32]:
        everything = np.empty((len(batch), self._hidden_width), dtype=np.float32)
        self._run(batch, cache, everything, logits=False)
        return everything if len(batch.wanted) == len(batch) else everything[batch.wanted]

    def logits(self, hidden: Array) -> NDArray[np.float32]:
        x = np.ascontiguousarray(hidden, dtype=np.float32)
        if not self._vocabulary:
            return x
        out = np.empty((len(x), self._vocabulary), dtype=np.float32)
        with self._lock:
            for begin in range(0, len(x), PASS_ROWS):
                part = slice(begin, begin + PASS_ROWS)
                self._program.logits(x[part], out[part])
        return out

    def extend(self, ids: Sequence[int], cache: Cache, last_only: bool) -> NDArray[np.float32]:
        start = cache.rows[0].length
        if len(ids) > 1 or self._rotary.by_length or not self._plain:
            return self.forward(Batch.of([ids], [start], "last" if last_only else "all"), cache)
        # Decoding. A pass over the weights leaves nothing of Python in the processor's caches, so every call here costs
        # ten times what it does in a loop of its own: there is as little of numpy as possible.
        out = np.empty((1, self._vocabulary), dtype=np.float32)
        with self._lock:
            cos, sin = self._rotary.by_position(start + 1)
            self._id[0] = ids[0]
            self._position[0] = start
            self._program.run(
                self._id,
                self._zero,
                self._position,
                cos,
                sin,
                self._position,
                native_pages(cache),
                cache.tables,
                self._first_row,
                out,
            )
        cache.advance(_ONE)
        return out

    def _run(self, batch: Batch, cache: Cache, out: NDArray[np.float32], *, logits: bool) -> None:
        """All passes for a batch, whose tokens are in the cache afterwards.

        Args:
            out: logits of the tokens that are wanted (L, V), or hidden states of all (R, hidden).
        """
        pages, tables = native_pages(cache), cache.tables
        encoder = self._encoder(batch, cache) if self._crosses else None
        states = States.of(cache, StateStore) if self._recurs else None
        with self._lock:
            (cos, sin), angles = self._rotary.of_batch(batch)
            begin = taken = 0
            for piece in batch.passes(self._mask, PASS_ROWS):
                end, stop = begin + len(piece), taken + len(piece.wanted)
                self._program.run(
                    piece.ids,
                    piece.sequences,
                    piece.positions,
                    cos,
                    sin,
                    angles[begin:end],
                    pages,
                    tables,
                    piece.wanted if logits else None,
                    out[taken:stop] if logits else out[begin:end],
                    None if self._mask == "causal" else piece.last_seen(self._mask),
                    encoder,
                    None if states is None else _slots(states.of_piece(batch, piece)),
                    piece.types,
                    piece.features,
                    piece.row_adapters,
                )
                begin, taken = end, stop
        cache.advance(batch.counts)

    @staticmethod
    def _encoder(batch: Batch, cache: Cache) -> tuple[_native.KVPages, NDArray[np.int32], NDArray[np.int32]]:
        """Pages, tables and lengths of the texts that cross attention reads."""
        encoder, lengths = encoder_lengths(cache, batch.counts)
        return native_pages(encoder), encoder.tables, lengths.astype(np.int32)


def _slots(
    states: States[StateStore],
) -> tuple[list[NDArray[np.float32]], NDArray[np.int32], NDArray[np.int32]]:
    """States as a program takes them: (slots, floats of one) each, and every sequence's slots before and after."""
    return [array.reshape(len(array), -1) for array in states.store.arrays], states.before, states.after
