"""Whisper's features of sound, as transformers' WhisperFeatureExtractor makes them of samples."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kbit.audio.wav import RATE
from kbit.host.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    Floats = NDArray[np.float32]

PREPROCESSOR = "preprocessor_config.json"
# Keys of that file, and what a model must say there, or leave out.
_FIXED: Mapping[str, tuple[Any, ...]] = {
    "sampling_rate": (None, RATE),
    "do_normalize": (None, False),
    "dither": (None, 0, 0.0),
}
_SIZES = ("chunk_length", "hop_length", "n_fft")


class Features:
    """Log-mel features.

    Args:
        files: the checkpoint's, of which preprocessor_config.json is read where it is there.
        bins: features of a frame (`num_mel_bins`).
        where: the checkpoint, for errors.

    Attributes:
        frames_per_second: how many frames there are.

    Raises:
        UsageError: transformers is not installed.
        CheckpointError: the file asks for other features than the model reads.
    """

    def __init__(self, files: Mapping[str, bytes], bins: int, where: str) -> None:
        try:
            from transformers import WhisperFeatureExtractor
        except ImportError:
            raise UsageError(
                "transformers is not installed, which makes the features of sound: pip install 'kbit[audio]'"
            ) from None
        given = _read(files, where)
        size = given.get("feature_size", bins)
        if size != bins:
            raise CheckpointError(f"{where}: feature_size of {PREPROCESSOR} is {size}, and num_mel_bins {bins}")
        for key, known in _FIXED.items():
            if given.get(key) not in known:
                raise CheckpointError(
                    f"{where}: {key} of {PREPROCESSOR} is {given[key]!r}; only {known[-1]!r} is known"
                )
        sizes = {key: given[key] for key in _SIZES if given.get(key) is not None}
        if any(type(value) is not int or value < 1 for value in sizes.values()):
            raise CheckpointError(f"{where}: {', '.join(_SIZES)} of {PREPROCESSOR} should be whole numbers above 0")
        self._extractor = WhisperFeatureExtractor(feature_size=bins, **sizes)
        self.frames_per_second = RATE / self._extractor.hop_length

    def of_window(self, samples: Floats) -> Floats:
        """Frames of a sound and the silence behind it, as long as what the model reads: (T, bins)."""
        return self._frames(samples, padding="max_length", truncation=True)

    def of_all(self, samples: Floats) -> Floats:
        """Frames of a sound of any length: (T, bins)."""
        return self._frames(samples, padding="longest", truncation=False)

    def _frames(self, samples: Floats, **settings: Any) -> Floats:
        found = self._extractor(samples, sampling_rate=RATE, return_tensors="np", **settings)
        return np.ascontiguousarray(found["input_features"][0].T, dtype=np.float32)


def _read(files: Mapping[str, bytes], where: str) -> dict[str, Any]:
    if PREPROCESSOR not in files:
        return {}
    try:
        found = json.loads(files[PREPROCESSOR])
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise CheckpointError(f"{where}: {PREPROCESSOR} is no JSON object: restore the published file")
    return found
