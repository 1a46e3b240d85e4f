"""Speech in, text out: Whisper on sounds of any length, as transformers' `generate` writes greedily.

A sound is heard in windows of 30 seconds. Where the text of one has timestamps, the next begins at the last of these,
so that no word is cut (Radford et al. 2022, arXiv:2212.04356, section 3.8); a longer sound has them always.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from kbit.audio.features import Features
from kbit.checkpoint.source import CheckpointSource
from kbit.engine.generation_settings import GENERATION_CONFIG, read_settings
from kbit.engine.score_rules import ScoreRules
from kbit.engine.sound_settings import SoundSettings, TimestampRules, read_sound_settings
from kbit.graph.backend import Backend
from kbit.graph.batch import Batch
from kbit.graph.cache import Cache
from kbit.host.errors import UsageError
from kbit.models.block_specs import SoundSpec
from kbit.models.encoder_decoder import load_encoder_decoder
from kbit.text.added_tokens import read_json
from kbit.text.tokenizer import Tokenizer

Floats = NDArray[np.float32]

# Seconds from one timestamp to the next.
_STEP = 0.02
_FIRST_ROOM = 64


@dataclass(frozen=True)
class Segment:
    """A part of a text.

    Attributes:
        start, end: in seconds.
        text: what was said, without special tokens.
        ids: its tokens, timestamps included.
    """

    start: float
    end: float
    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Transcription:
    """What was said.

    Attributes:
        text: all of it.
        segments: its parts.
        language: the code of what is spoken; None where the model knows English alone.
        tokens: written, in all windows.
        windows: that were heard.
        unfinished: of these, how many texts were cut off.
    """

    text: str
    segments: tuple[Segment, ...]
    language: str | None
    tokens: int
    windows: int
    unfinished: int


class Transcriber:
    """A model in memory.

    Args:
        source: the checkpoint, as `kbit.models.opening.open_model` opens it.
        backend: who computes.

    Attributes:
        model: the model.
        sound: tokens of languages, tasks and timestamps.
        load_seconds: from opening the checkpoint's tokenizer to the last prepared weight.

    Raises:
        CheckpointError, UnsupportedError: the model cannot be read or run.
        UsageError: it hears nothing, or transformers is not installed.
    """

    def __init__(self, source: CheckpointSource, backend: Backend) -> None:
        start = perf_counter()
        self._where = str(source.path)
        self.tokenizer = Tokenizer.from_source(source)
        self.model = load_encoder_decoder(source, backend)
        heard = self.model.encoder_spec.sound
        if heard is None:
            raise UsageError(f"{self._where}: a {self.model.spec.family} model reads text: use kbit translate")
        self._heard: SoundSpec = heard
        files = source.sidecar_files()
        self._features = Features(files, heard.bins, self._where)
        given = read_json(files, GENERATION_CONFIG, self._where) if GENERATION_CONFIG in files else source.config
        where, vocabulary = f"{self._where}: {GENERATION_CONFIG}", self.model.spec.vocab_size
        # (Without a length, a text may be as long as there are positions.)
        room = {} if given.get("max_length") or given.get("max_new_tokens") else {"max_length": self._room}
        self.settings = replace(read_settings(source, vocabulary, room), beams=1)
        self._new: int | None = given.get("max_new_tokens")
        end = self.settings.ends[0] if self.settings.ends else vocabulary
        self.sound: SoundSettings = read_sound_settings(given, vocabulary, self.settings.start, end, where)
        self.load_seconds = perf_counter() - start

    @property
    def _room(self) -> int:
        """Positions of a text."""
        return self.model.spec.context_length

    def transcribe(
        self,
        samples: Floats,
        *,
        language: str | None = None,
        task: str | None = None,
        timestamps: bool | None = None,
        max_tokens: int | None = None,
    ) -> Transcription:
        """What is said in a sound.

        Args:
            samples: float32 (N,), 16,000 a second.
            language: what is spoken, as a code; None: what the files say, else the model is asked.
            task: "transcribe", or "translate" into English; None: what the files say, else the first.
            timestamps: whether segments are wanted; a sound of more than a window has them always.
            max_tokens: most tokens of a window's text; None: as the model says.

        Raises:
            UsageError: a language, a task or timestamps that the model does not have; more tokens than positions.
        """
        sound = self.sound
        window = self.model.sound_frames
        frames = self._features.of_all(samples)
        long = len(frames) > window
        if not long:
            frames = self._features.of_window(samples)
        task = task or sound.task
        timed = long or (sound.timestamps if timestamps is None else timestamps)
        sound.check(task, self._where, timestamps=timed)
        token = self._language(language or sound.language, frames[:window])
        begin = sound.beginning(token, task, timestamps=timed)
        longest = self._longest(len(begin), max_tokens)
        seconds = 1.0 / self._features.frames_per_second
        segments: list[Segment] = []
        at = written = windows = unfinished = 0
        while at < len(frames):
            piece = frames[at : at + window]
            ids, finished = self._write(self._encoded(piece), begin, longest, timed=timed)
            windows, written, unfinished = windows + 1, written + len(ids), unfinished + (not finished)
            found, moved = self._segments(ids, at * seconds, len(piece), seconds)
            segments += found
            at += moved or len(piece)
        codes = {id: code for code, id in sound.languages.items()}
        text = self._decoded([id for segment in segments for id in segment.ids])
        return Transcription(
            text, tuple(segments), None if token is None else codes[token], written, windows, unfinished
        )

    def _language(self, language: str | None, frames: Floats) -> int | None:
        """The token of what is spoken: as given, or the likeliest after the first of all tokens."""
        if language is not None:
            return self.sound.language_token(language, self._where)
        if not self.sound.languages:
            return None
        cache = self._encoded(frames)
        logits = self.model.run(Batch.of([[self.sound.start]], cache.lengths), cache)[0]
        tokens = list(self.sound.languages.values())
        return tokens[int(logits[tokens].argmax())]

    def _longest(self, begun: int, max_tokens: int | None) -> int:
        """Tokens of a text at most, what it begins with included."""
        if max_tokens is None and self._new is not None:
            return min(self._new + begun, self._room)
        if max_tokens is None:
            return min(self.settings.longest + begun, self._room)
        if begun + max_tokens > self._room:
            raise UsageError(
                f"--max-tokens {max_tokens}: this {self.model.spec.family} model has {self._room} positions, of which "
                f"a text's beginning takes {begun}: use --max-tokens {self._room - begun}"
            )
        return begun + max_tokens

    def _encoded(self, frames: Floats) -> Cache:
        """The encoder's keys and values of some frames, and of nothing behind them."""
        silence = np.zeros((self.model.sound_frames - len(frames), frames.shape[1]), dtype=np.float32)
        return self.model.encode_sounds([np.concatenate([frames, silence])], min(_FIRST_ROOM, self._room))

    def _write(self, cache: Cache, begin: list[int], longest: int, *, timed: bool) -> tuple[list[int], bool]:
        """The likeliest tokens one by one; without the last, and whether it was one that ends a text."""
        rules = ScoreRules(replace(self.settings, longest=longest), len(begin))
        times = TimestampRules(self.sound, len(begin)) if timed else None
        text, new = list(begin), list(begin)
        while len(text) < longest:
            if len(text) > cache.capacity:
                cache.grow(min(self._room, 2 * cache.capacity))
            scores = self.model.run(Batch.of([new], cache.lengths), cache)
            rules.apply([text], [[]], scores)
            if times is not None:
                times.apply(text, scores[0])
            new = [int(scores[0].argmax())]
            if new[0] in self.settings.ends:
                return text[len(begin) :], True
            text += new
        return text[len(begin) :], False

    def _segments(self, ids: Sequence[int], start: float, frames: int, seconds: float) -> tuple[list[Segment], int]:
        """A window's text by its timestamps, and how many frames further the next window begins."""
        first = self.sound.first_timestamp
        is_time = [first is not None and id >= first for id in ids]
        cuts = [index + 1 for index in range(len(ids) - 1) if is_time[index] and is_time[index + 1]]

        def time(id: int) -> float:
            assert first is not None
            return start + (id - first) * _STEP

        if not cuts:
            times = [id for id, one in zip(ids, is_time, strict=True) if one]
            end = time(times[-1]) if times and times[-1] != first else start + frames * seconds
            return ([Segment(start, end, self._decoded(ids), tuple(ids))] if ids else []), frames
        alone = is_time[-2:] == [False, True]  # nothing is said after it
        if alone:
            cuts.append(len(ids))
        else:
            cuts[-1] += 1  # (the next window says again what comes after it)
        found = []
        for index, (low, high) in enumerate(zip([0, *cuts], cuts, strict=False)):
            part = ids[low:high]
            last = part[-2] if index == len(cuts) - 1 and not alone else part[-1]
            found.append(Segment(time(part[0]), time(last), self._decoded(part), tuple(part)))
        if alone:
            return found, frames
        assert first is not None
        return found, (ids[cuts[-1] - 2] - first) * self._heard.stride

    def _decoded(self, ids: Sequence[int]) -> str:
        """The words of some tokens: what is special, timestamps included, has ids from that of the end on."""
        return self.tokenizer.decode([id for id in ids if id < self.sound.end])
