"""NativeRunner: replays a recorded model for any number of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock

import numpy as np
import torch
from numpy.typing import NDArray

from kbit import _native
from kbit.backends.cpu.kv_cache import NativeKVCache
from kbit.backends.cpu.lowering import lower_body, lower_head
from kbit.backends.rotary import RotaryTable
from kbit.graph.cache import Cache
from kbit.graph.ops import Definition
from kbit.graph.recording import Recorder, Symbol

# Tokens that go through the program at once: bounds the memory of its buffers.
PASS_ROWS = 512

_ONE = [1]


@dataclass(frozen=True, eq=False)
class Recorded:
    """A model as a program.

    Attributes:
        program: body and head.
        hidden_width: features of a hidden state.
        vocabulary: V.
    """

    program: _native.Program
    hidden_width: int
    vocabulary: int


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
    return Recorded(program, hidden.width, logits.width)


class NativeRunner:
    """Runs a program on token ids (a `kbit.graph.ops.Runner`).

    Only real tokens become rows of a pass, sequence after sequence, so a ragged batch does no work for its padding.
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
        # Arguments of a pass of one token: filled in, never allocated.
        self._id = np.zeros(1, dtype=np.int64)
        self._position = np.zeros(1, dtype=np.int32)
        self._zero = np.zeros(1, dtype=np.int32)
        self._first_row = np.zeros(1, dtype=np.int64)

    def forward(self, ids: torch.Tensor, cache: Cache, lengths: Sequence[int], last_only: bool) -> torch.Tensor:
        cache = _native_cache(cache)
        width = ids.shape[1]
        if len(lengths) == 1 and lengths[0] == width:
            return torch.from_numpy(self.extend(ids[0].tolist(), cache, last_only)[None])
        tokens = _real(ids, lengths)
        if last_only:
            taken = [min(length, 1) for length in lengths]
            rows = np.cumsum(lengths)[np.array(lengths) > 0] - 1
            return _padded(self._logits(tokens, lengths, cache, rows), taken, 1)
        return _padded(self._logits(tokens, lengths, cache, np.arange(len(tokens))), lengths, width)

    def hidden(self, ids: torch.Tensor, cache: Cache, lengths: Sequence[int]) -> torch.Tensor:
        tokens = _real(ids, lengths)
        out = np.empty((len(tokens), self._hidden_width), dtype=np.float32)
        self._run(tokens, lengths, _native_cache(cache), None, out)
        return _padded(out, lengths, ids.shape[1])

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        x = np.ascontiguousarray(hidden.detach().numpy().reshape(-1, self._hidden_width))
        out = np.empty((len(x), self._vocabulary), dtype=np.float32)
        with self._lock:
            for begin in range(0, len(x), PASS_ROWS):
                part = slice(begin, begin + PASS_ROWS)
                self._program.logits(x[part], out[part])
        return torch.from_numpy(out).view(*hidden.shape[:-1], self._vocabulary)

    def extend(self, ids: Sequence[int], cache: Cache, last_only: bool) -> NDArray[np.float32]:
        cache = _native_cache(cache)
        if len(ids) > 1 or self._rotary.by_length:
            rows = np.arange(len(ids) - 1 if last_only else 0, len(ids))
            return self._logits(np.array(ids, dtype=np.int64), [len(ids)], cache, rows)
        # Decoding. A pass over the weights leaves nothing of Python in the processor's caches, so every call here costs
        # ten times what it does in a loop of its own: there is no torch, and as little of numpy as possible.
        native = cache.native
        start = native.length(0)
        out = np.empty((1, self._vocabulary), dtype=np.float32)
        with self._lock:
            cos, sin = self._rotary.by_position(start + 1)
            self._id[0] = ids[0]
            self._position[0] = start
            self._program.run(
                self._id, self._zero, self._position, cos, sin, self._position, native, self._first_row, out
            )
        native.advance(_ONE)
        return out

    def _logits(
        self, tokens: NDArray[np.int64], lengths: Sequence[int], cache: NativeKVCache, rows: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Runs tokens; the logits (L, V) of some of them, by index in ascending order."""
        out = np.empty((len(rows), self._vocabulary), dtype=np.float32)
        self._run(tokens, lengths, cache, rows, out)
        return out

    def _run(
        self,
        tokens: NDArray[np.int64],
        lengths: Sequence[int],
        cache: NativeKVCache,
        rows: NDArray[np.int64] | None,
        out: NDArray[np.float32],
    ) -> None:
        """All passes for some tokens, which are in the cache afterwards.

        Args:
            tokens: ids (R,), those of the first sequence first.
            lengths: how many of them each sequence has.
            cache: where they go.
            rows: indices (L,) of the tokens whose logits are wanted, ascending; None: the hidden states of all.
            out: logits (L, V), or hidden states (R, hidden).
        """
        if not len(tokens):
            return
        starts, counts = np.array(cache.native.lengths()), np.array(lengths)
        sequences = np.arange(len(counts), dtype=np.int32).repeat(counts)
        index = np.arange(len(tokens), dtype=np.int32)
        # A token's position is its index here, less that of its sequence's first token, plus where the sequence was.
        positions = index + (starts + counts - counts.cumsum()).astype(np.int32).repeat(counts)
        with self._lock:
            if self._rotary.by_length:
                (cos, sin), angles = self._rotary.of_spans(starts, starts + counts), index
            else:
                (cos, sin), angles = self._rotary.by_position(int((starts + counts).max())), positions
            for begin in range(0, len(tokens), PASS_ROWS):
                part = slice(begin, begin + PASS_ROWS)
                if rows is None:
                    wanted, target = None, out[part]
                else:
                    low, high = np.searchsorted(rows, (begin, begin + PASS_ROWS))
                    wanted, target = rows[low:high] - begin, out[low:high]
                self._program.run(
                    tokens[part], sequences[part], positions[part], cos, sin, angles[part], cache.native, wanted, target
                )
        cache.advance(lengths)


def _native_cache(cache: Cache) -> NativeKVCache:
    if not isinstance(cache, NativeKVCache):
        raise TypeError(f"a {type(cache).__name__} was made by another backend")
    return cache


def _real(ids: torch.Tensor, lengths: Sequence[int]) -> NDArray[np.int64]:
    """The real tokens of a right-padded batch (B, T), row after row: (R,)."""
    array: NDArray[np.int64] = ids.numpy()
    if min(lengths) == array.shape[1]:
        return array.reshape(-1)
    return np.concatenate([row[:length] for row, length in zip(array, lengths, strict=True)])


def _padded(values: NDArray[np.float32], lengths: Sequence[int], width: int) -> torch.Tensor:
    """Rows of real tokens (R, N) as a right-padded batch (B, width, N), with zeros for padding."""
    if len(values) == width * len(lengths):
        return torch.from_numpy(values).view(len(lengths), width, -1)
    out = np.zeros((len(lengths), width, values.shape[1]), dtype=np.float32)
    done = 0
    for row, length in zip(out, lengths, strict=True):
        row[:length] = values[done : done + length]
        done += length
    return torch.from_numpy(out)
