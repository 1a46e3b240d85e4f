"""How Whisper's texts begin and end: languages, tasks and timestamps, as generation_config.json has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kbit.engine.score_rules import log_softmax
from kbit.host.errors import CheckpointError, UnsupportedError, UsageError
from kbit.models.config_values import shown

Floats = NDArray[np.float32]

TASKS = ("transcribe", "translate")
# What transformers does where these are set, and nothing here does.
_REFUSED: Mapping[str, tuple[Any, ...]] = {
    "_detect_timestamp_from_logprob": (None, True),
    "compression_ratio_threshold": (None,),
    "condition_on_prev_tokens": (None, False),
    "logprob_threshold": (None,),
    "no_speech_threshold": (None,),
    "num_beams": (None, 1),
    "prompt_condition_type": (None,),
}


@dataclass(frozen=True)
class SoundSettings:
    """What generation_config.json says of speech.

    Attributes:
        start: the token that every text begins with.
        end: that which ends one.
        languages: tokens by code ("en"); none where the model knows English alone.
        tasks: tokens by name.
        no_timestamps: the token behind which there are none; timestamps have the ids above it. None: there are none.
        latest_first: the largest timestamp that a text may begin with, in steps; None: any.
        language: what is spoken where the user does not say; None: the model is asked.
        task: likewise.
        timestamps: whether there are any where the user does not say.
    """

    start: int
    end: int
    languages: Mapping[str, int] = field(default_factory=dict)
    tasks: Mapping[str, int] = field(default_factory=dict)
    no_timestamps: int | None = None
    latest_first: int | None = None
    language: str | None = None
    task: str = "transcribe"
    timestamps: bool = False

    @property
    def first_timestamp(self) -> int | None:
        """The id of 0 seconds."""
        return None if self.no_timestamps is None else self.no_timestamps + 1

    def beginning(self, language: int | None, task: str, *, timestamps: bool) -> list[int]:
        """What the decoder is given before it writes.

        Args:
            language: the token of what is spoken; None where the model has no languages.
            task: of TASKS.
            timestamps: whether there are to be any.
        """
        found = [self.start]
        if language is not None:
            found.append(language)
        if task in self.tasks:
            found.append(self.tasks[task])
        if not timestamps and self.no_timestamps is not None:
            found.append(self.no_timestamps)
        return found

    def language_token(self, language: str, where: str) -> int | None:
        """The token of a language.

        Raises:
            UsageError: the model does not have it.
        """
        code = language.lower().strip("<|>")
        if not self.languages and code == "en":
            return None
        if code not in self.languages:
            known = ", ".join(sorted(self.languages)) or "en"
            raise UsageError(f"{where}: --language {language}: this model knows {known}")
        return self.languages[code]

    def check(self, task: str, where: str, *, timestamps: bool) -> None:
        """Raise where a model cannot do what is asked.

        Raises:
            UsageError: there is no such task, or there are no timestamps.
        """
        if task not in TASKS:
            raise UsageError(f"--task {task}: use one of {', '.join(TASKS)}")
        if task != "transcribe" and task not in self.tasks:
            raise UsageError(f"{where}: --task {task}: this model transcribes English only")
        if timestamps and self.no_timestamps is None:
            raise UsageError(
                f"{where}: generation_config.json names no no_timestamps_token_id, so there are no timestamps, which "
                "long sounds need, too: give at most 30 seconds, without --timestamps"
            )


def read_sound_settings(given: Mapping[str, Any], vocabulary: int, start: int, end: int, where: str) -> SoundSettings:
    """What a generation_config.json says.

    Args:
        given: its keys.
        vocabulary: how many tokens there are.
        start, end: tokens of `kbit.engine.generation_settings`.
        where: for errors.

    Raises:
        CheckpointError: a senseless value.
        UnsupportedError: a key asks for what is not done here.
    """
    for key, harmless in _REFUSED.items():
        if given.get(key) not in harmless:
            raise UnsupportedError(
                f"{where}: {key} {shown(given[key])} is not supported; remove the key, or set it to {harmless[-1]!r}"
            )
    languages = {name.strip("<|>"): token for name, token in _tokens(given, "lang_to_id", vocabulary, where).items()}
    tasks = _tokens(given, "task_to_id", vocabulary, where)
    marks = {key: given.get(key) for key in ("no_timestamps_token_id", "max_initial_timestamp_index")}
    for key, value in marks.items():
        if value is not None and (type(value) is not int or not 0 <= value < vocabulary):
            raise CheckpointError(f"{where}: {key} is {shown(value)}; it should be a number below {vocabulary}")
    language, task = given.get("language"), given.get("task")
    if language is None and task is None:
        language, task = _forced(given, languages, tasks)
    if language is not None and str(language).strip("<|>") not in languages:
        raise CheckpointError(f"{where}: language is {shown(language)}, which lang_to_id does not have")
    if task not in (None, *TASKS):
        raise CheckpointError(f"{where}: task is {shown(task)}; it should be one of {', '.join(TASKS)}")
    return SoundSettings(
        start=start,
        end=end,
        languages=languages,
        tasks=tasks if languages else {},
        no_timestamps=marks["no_timestamps_token_id"],
        latest_first=marks["max_initial_timestamp_index"],
        language=None if language is None else str(language).strip("<|>"),
        task=task or "transcribe",
        timestamps=given.get("return_timestamps") is True,
    )


def _tokens(given: Mapping[str, Any], key: str, vocabulary: int, where: str) -> dict[str, int]:
    found = given.get(key) or {}
    if not isinstance(found, Mapping) or not all(type(v) is int and 0 <= v < vocabulary for v in found.values()):
        raise CheckpointError(f"{where}: {key} should be an object of token ids below {vocabulary}")
    return dict(found)


def _forced(
    given: Mapping[str, Any], languages: Mapping[str, int], tasks: Mapping[str, int]
) -> tuple[str | None, str | None]:
    """Language and task as older files have them: tokens by their place."""
    pairs = given.get("forced_decoder_ids")
    pairs = pairs if isinstance(pairs, list) else []
    tokens = {pair[1] for pair in pairs if isinstance(pair, list) and len(pair) == 2 and type(pair[1]) is int}
    language = next((code for code, token in languages.items() if token in tokens), None)
    return language, next((task for task, token in tasks.items() if token in tokens), None)


class TimestampRules:
    """What may come next in a text with timestamps, as transformers' WhisperTimeStampLogitsProcessor has it.

    They come in pairs, but for the last before the end, and never go back; where all of them together are more likely
    than the likeliest word, one of them comes.

    Args:
        settings: which tokens they are.
        begin: length of what the text begins with.
    """

    def __init__(self, settings: SoundSettings, begin: int) -> None:
        assert settings.no_timestamps is not None
        self._settings, self._begin = settings, begin
        self._first = settings.no_timestamps + 1

    def apply(self, text: Sequence[int], row: Floats) -> None:
        """Changes the scores of what comes after a text in place: (V,)."""
        first, written = self._first, text[self._begin :]
        row[self._settings.no_timestamps] = -np.inf
        last = bool(written) and written[-1] >= first
        before = len(written) < 2 or written[-2] >= first
        if last and before:
            row[first:] = -np.inf
        elif last:
            row[: self._settings.end] = -np.inf
        earlier = [token for token in written if token >= first]
        if earlier:
            row[first : earlier[-1] + (0 if last and not before else 1)] = -np.inf
        if not written:
            row[:first] = -np.inf
            if self._settings.latest_first is not None:
                row[first + self._settings.latest_first + 1 :] = -np.inf
        logs = log_softmax(row)
        times, best = logs[first:], logs[:first].max()
        highest = times.max()
        if np.isfinite(highest) and highest + np.log(np.exp(times - highest).sum(dtype=np.float32)) > best:
            row[:first] = -np.inf
