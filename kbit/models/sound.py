"""What an encoder of sound (Whisper) makes of frames before its layers: two convolutions over neighbouring frames.

Each is a linear of gathered rows, a frame's neighbours beside it, so products are all that backends compute. The first
is a definition of its own, as it has a row for every frame, and the encoder's layers one for every `stride` frames.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kbit.graph.backend import Array, Backend
from kbit.graph.batch import Batch
from kbit.graph.ops import Ops, X
from kbit.models.block_specs import SoundSpec
from kbit.models.blocks import Weights
from kbit.models.rope import rope_tables
from kbit.models.spec import ModelSpec

Floats = NDArray[np.float32]


def gathered(frames: Floats, taps: int, stride: int = 1) -> Floats:
    """The rows that a convolution multiplies: around every `stride`-th frame `taps` of them, zeros beyond the ends.

    Args:
        frames: (T, F).
        taps: odd.
        stride: of the frames in the middle.

    Returns:
        (ceil(T / stride), F taps), of each feature all frames, as the weights of convolutions are published.
    """
    padded = np.pad(frames, ((taps // 2, taps // 2), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, taps, axis=0)[::stride]  # (T', F, taps)
    return np.ascontiguousarray(windows.reshape(len(windows), -1))


def convolved(ops: Ops[X], spec: ModelSpec, weights: Weights, slot: str) -> X:
    """The convolution in a slot, activated, of rows that the pass brings: (..., hidden)."""
    linear = weights.linear(slot)
    rows = ops.given(linear.weight.shape[1])
    return ops.activate(ops.linear(linear.weight, rows, linear.bias), None, spec.activation)


class FrameDefinition:
    """The first convolution: a `kbit.graph.backend.Definition` without a head.

    Args:
        spec: of the encoder.
        weights: its own outside of the layers.
    """

    rotation_depends_on_length = False

    def __init__(self, spec: ModelSpec, weights: Weights) -> None:
        self.spec, self.weights = spec, weights

    def body(self, ops: Ops[X], ids: X) -> X:
        """Gathered frames -> (..., hidden)."""
        return convolved(ops, self.spec, self.weights, "sound_first")

    def head(self, ops: Ops[X], hidden: X) -> X:
        """Itself: there is none."""
        return hidden

    def rotation(
        self, positions: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Nothing rotates."""
        return rope_tables(self.spec.rope, positions, lengths)


class Frames:
    """The first convolution of a model, bound to a backend.

    Args:
        spec: of the encoder.
        sound: what it reads.
        weights: its own outside of the layers.
        backend: who computes.
    """

    def __init__(self, spec: ModelSpec, sound: SoundSpec, weights: Weights, backend: Backend) -> None:
        self._spec, self._sound, self._backend = spec, sound, backend
        self._runner = backend.bind(FrameDefinition(spec, weights))

    def rows(self, sounds: Sequence[Floats]) -> list[Floats]:
        """What the second convolution multiplies of some sounds: (T, bins) -> (T / stride, hidden taps) each."""
        spec, sound = self._spec, self._sound
        found = []
        for frames in sounds:  # (one after another: a text is thousands of frames)
            batch = Batch.of_features([gathered(frames, sound.taps)])
            cache = self._backend.new_cache(1, 1, 1, spec.head_dim, len(batch))
            cache.reserve(batch.counts)
            made = numpy_rows(self._runner.hidden(batch, cache))
            found.append(gathered(made, sound.taps, sound.stride))
        return found


def numpy_rows(x: Array) -> Floats:
    """A runner's result on the CPU."""
    if isinstance(x, np.ndarray):
        return x
    values: Floats = x.float().cpu().numpy()
    return values
