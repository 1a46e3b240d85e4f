"""WAV files as models hear them: one channel, 16,000 samples a second."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kbit.host.errors import UsageError

if TYPE_CHECKING:
    Floats = NDArray[np.float32]

RATE = 16_000
_RATES = (1_000, 768_000)


def read_wav(path: Path) -> Floats:
    """The samples of a WAV file, whatever its rate, width and channels: float32 (N,), full scale is 1.

    Raises:
        UsageError: it cannot be read, is no WAV file, has no samples, or some that are no numbers.
    """
    import warnings

    from scipy.io import wavfile

    convert = f"convert it with: ffmpeg -i {path} -ar {RATE} -ac 1 {path.with_suffix('')}.16k.wav"
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore", wavfile.WavFileWarning)  # of chunks with what is said about the sound
            rate, stored = wavfile.read(file)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); give a WAV file") from None
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UsageError(f"{path}: no WAV file that can be read ({reason}); {convert}") from None
    if not _RATES[0] <= rate <= _RATES[1]:
        raise UsageError(f"{path}: a rate of {rate} samples a second is none of sound; {convert}")
    samples = _full_scale(stored)
    if not samples.size:
        raise UsageError(f"{path}: holds no samples, so there is nothing to hear")
    if not np.isfinite(samples).all():
        raise UsageError(f"{path}: holds samples that are no finite numbers; {convert}")
    return resampled(samples.mean(axis=1) if samples.ndim > 1 else samples, rate)


def resampled(samples: NDArray[np.float64], rate: int) -> Floats:
    """Samples (N,) at another rate as float32 at RATE."""
    if rate != RATE:
        from scipy.signal import resample_poly

        divisor = math.gcd(rate, RATE)
        samples = resample_poly(samples, RATE // divisor, rate // divisor)
    return samples.astype(np.float32)


def _full_scale(stored: NDArray[Any]) -> NDArray[np.float64]:
    """Stored samples as numbers of which the largest is 1; those of 8 bits are stored without signs."""
    if stored.dtype.kind == "f":
        return stored.astype(np.float64)
    if stored.dtype == np.uint8:
        return (stored.astype(np.float64) - 128.0) / 128.0
    return stored.astype(np.float64) / float(2 ** (8 * stored.dtype.itemsize - 1))
