"""WAV files of every kind become samples at 16,000 a second; what is no WAV file is refused with a line that helps."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import pytest
from scipy.io import wavfile

from kbit.audio.wav import RATE, read_wav
from kbit.host.errors import UsageError

TIMES = np.arange(RATE) / RATE
TONE = 0.5 * np.sin(2 * np.pi * 440 * TIMES)


@pytest.mark.parametrize(
    ("dtype", "step"), [("uint8", 2.0**-7), ("int16", 2.0**-15), ("int32", 2.0**-24), ("float32", 2.0**-24)]
)
def test_every_width_has_the_same_scale(dtype: str, step: float, tmp_path: Path) -> None:
    kind = np.dtype(dtype)
    stored = TONE.astype(kind) if kind.kind == "f" else np.round(TONE * (2.0 ** (8 * kind.itemsize - 1) - 1))
    wavfile.write(tmp_path / "x.wav", RATE, (stored + 128 * (kind == np.uint8)).astype(kind))
    found = read_wav(tmp_path / "x.wav")
    assert found.dtype == np.float32
    # Half a step of rounding, and a full scale that is one step less.
    assert np.abs(found - TONE).max() <= 2 * step


def test_24_bits(tmp_path: Path) -> None:
    numbers = np.round(TONE * (2**23 - 1)).astype("<i4")
    with wave.open(str(tmp_path / "x.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(3)
        file.setframerate(RATE)
        file.writeframes(b"".join(int(number).to_bytes(3, "little", signed=True) for number in numbers))
    assert np.abs(read_wav(tmp_path / "x.wav") - TONE).max() <= 2 * 2.0**-23


def test_channels_are_averaged(tmp_path: Path) -> None:
    wavfile.write(tmp_path / "x.wav", RATE, np.stack([TONE, 0.5 * TONE], axis=1).astype(np.float32))
    assert np.abs(read_wav(tmp_path / "x.wav") - 0.75 * TONE).max() <= 2.0**-23


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_other_rates_are_the_same_sound(rate: int, tmp_path: Path) -> None:
    times = np.arange(rate) / rate
    wavfile.write(tmp_path / "x.wav", rate, (0.5 * np.sin(2 * np.pi * 440 * times)).astype(np.float32))
    found = read_wav(tmp_path / "x.wav")
    assert len(found) == RATE
    # Away from the ends, where the filter sees silence; its ripple is below a percent.
    assert np.abs(found[800:-800] - TONE[800:-800]).max() < 0.005


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            b"ID3\x03" + bytes(100),
            "no WAV file that can be read .*; convert it with: ffmpeg -i .*x.wav -ar 16000 -ac 1",
        ),
        (b"RIFF\x10\x00\x00\x00WAVE", "no WAV file that can be read"),
        (b"", "no WAV file that can be read"),
    ],
)
def test_what_is_no_wav_file(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.wav").write_bytes(data)
    with pytest.raises(UsageError, match=message):
        read_wav(tmp_path / "x.wav")


def test_what_cannot_be_heard(tmp_path: Path) -> None:
    path = tmp_path / "x.wav"
    for rate, samples, message in (
        (RATE, np.zeros(0, dtype=np.int16), "holds no samples"),
        (RATE, np.array([0.0, np.nan], dtype=np.float32), "no finite numbers"),
        (10, np.zeros(20, dtype=np.int16), "a rate of 10 samples a second is none of sound"),
    ):
        wavfile.write(path, rate, samples)
        with pytest.raises(UsageError, match=message):
            read_wav(path)
    with pytest.raises(UsageError, match=r"cannot be read \(No such file"):
        read_wav(tmp_path / "none.wav")
