"""Sounds become the tokens that transformers' `generate` writes: short and long, with timestamps and languages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import encoder_decoder_cases as cases
import numpy as np
import pytest
import sound_cases as sounds
import torch

from kbit.engine.sound_settings import read_sound_settings
from kbit.engine.transcribe import Transcriber
from kbit.host.errors import CheckpointError, UnsupportedError, UsageError
from kbit.models.opening import open_model

pytestmark = pytest.mark.usefixtures("one_thread")


def transcriber(folder: Path) -> Transcriber:
    with open_model(str(folder)) as source:
        return Transcriber(source, cases.native())


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder, model = tmp_path_factory.mktemp("whisper"), sounds.whisper(seed=1)
    return sounds.saved_whisper(model, folder), model


def generated(model: Any, samples: sounds.Floats, **settings: Any) -> list[int]:
    """What transformers writes of a sound, without what it is given."""
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor(feature_size=sounds.BINS, chunk_length=sounds.SECONDS)
    long = len(samples) > 16_000 * sounds.SECONDS
    how = {"padding": "longest", "truncation": False} if long else {}
    heard = extractor(samples, sampling_rate=16_000, return_tensors="pt", **how)["input_features"]
    with torch.no_grad():
        found = model.generate(heard, **settings)[0].tolist()
    return [token for token in found if token != sounds.END]


@pytest.mark.parametrize("task", ["transcribe", "translate"])
@pytest.mark.parametrize("timestamps", [False, True])
def test_short_sounds(task: str, timestamps: bool, whisper: tuple[Path, Any]) -> None:
    folder, model = whisper
    ours = transcriber(folder)
    for seed in (5, 6):
        heard = sounds.sound(1.3, seed)
        found = ours.transcribe(heard, language="de", task=task, timestamps=timestamps)
        wanted = generated(model, heard, language="de", task=task, return_timestamps=timestamps)
        assert [token for part in found.segments for token in part.ids] == wanted
        assert found.language == "de"
        assert any(token >= sounds.FIRST_TIME for token in wanted) or not timestamps


@pytest.mark.parametrize("seed", [5, 6])
def test_long_sounds(seed: int, whisper: tuple[Path, Any]) -> None:
    """Windows go on where the last timestamp of the one before is, or where it ends; the language is asked of the model."""
    folder, model = whisper
    heard = sounds.sound(5.3, seed)
    found = transcriber(folder).transcribe(heard)
    wanted = generated(model, heard, task="transcribe", return_timestamps=True, return_segments=False)
    assert [token for part in found.segments for token in part.ids] == wanted
    assert found.windows >= 3
    assert found.language in ("en", "de")


def test_segments_have_the_times_of_transformers(whisper: tuple[Path, Any]) -> None:
    from transformers import WhisperFeatureExtractor

    folder, model = whisper
    heard = sounds.sound(4.1)
    extractor = WhisperFeatureExtractor(feature_size=sounds.BINS, chunk_length=sounds.SECONDS)
    features = extractor(heard, sampling_rate=16_000, return_tensors="pt", padding="longest", truncation=False)
    with torch.no_grad():
        wanted = model.generate(
            features["input_features"], task="transcribe", return_timestamps=True, return_segments=True
        )
    found = transcriber(folder).transcribe(heard).segments
    theirs = wanted["segments"][0]
    assert len(found) == len(theirs)
    for ours, other in zip(found, theirs, strict=True):
        assert (ours.start, ours.end) == pytest.approx((float(other["start"]), float(other["end"])), abs=1e-6)


def test_languages_are_asked_of_the_model(whisper: tuple[Path, Any]) -> None:
    folder, model = whisper
    ours = transcriber(folder)
    for seed in range(3):
        frames = ours._features.of_window(sounds.sound(1.0, seed))
        detected = model.detect_language(torch.from_numpy(frames.T[None]), generation_config=model.generation_config)
        assert ours._language(None, frames) == int(detected[0])


def test_a_model_of_english_alone(tmp_path: Path) -> None:
    alone = {k: v for k, v in sounds.GENERATION.items() if k not in ("lang_to_id", "task_to_id")} | {
        "is_multilingual": False
    }
    model = sounds.whisper(seed=2)
    ours = transcriber(sounds.saved_whisper(model, tmp_path, alone))
    heard = sounds.sound(1.3)
    found = ours.transcribe(heard, language="en", max_tokens=9)
    assert list(found.segments[0].ids) == generated(model, heard, max_new_tokens=9)
    assert found.language is None
    for settings, message in (
        ({"language": "de"}, "--language de: this model knows en"),
        ({"task": "translate"}, "--task translate: this model transcribes English only"),
        ({"max_tokens": 79}, "use --max-tokens 78"),
    ):
        with pytest.raises(UsageError, match=message):
            ours.transcribe(heard, **settings)
    last = ours.transcribe(heard, max_tokens=78)
    assert last.tokens <= 78 * last.windows


def test_a_text_that_is_cut_off_is_counted(whisper: tuple[Path, Any]) -> None:
    found = transcriber(whisper[0]).transcribe(sounds.sound(1.0), language="en", max_tokens=1)
    assert (found.tokens, found.unfinished, found.windows) == (1, 1, 1)


def read(**changes: Any) -> Any:
    return read_sound_settings({**sounds.GENERATION, **changes}, sounds.SIZE, sounds.START, sounds.END, "x")


def test_what_older_files_say_of_language_and_task() -> None:
    forced = read(forced_decoder_ids=[[1, sounds.GERMAN], [2, sounds.TRANSLATE]])
    assert (forced.language, forced.task) == ("de", "translate")
    open_one = read(forced_decoder_ids=[[1, None], [2, sounds.TRANSCRIBE]])
    assert (open_one.language, open_one.task) == (None, "transcribe")
    said = read(language="<|en|>", task="translate", return_timestamps=True)
    assert (said.language, said.task, said.timestamps) == ("en", "translate", True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"no_speech_threshold": 0.6}, "no_speech_threshold 0.6 is not supported"),
        ({"condition_on_prev_tokens": True}, "condition_on_prev_tokens True is not supported"),
        ({"no_timestamps_token_id": sounds.SIZE}, "no_timestamps_token_id is 198"),
        ({"lang_to_id": {"<|en|>": "x"}}, "lang_to_id should be an object of token ids"),
        ({"language": "fr"}, "language is 'fr', which lang_to_id does not have"),
        ({"task": "sing"}, "task is 'sing'; it should be one of"),
    ],
)
def test_settings_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((CheckpointError, UnsupportedError), match=message):
        read(**changes)


def test_models_without_timestamps(tmp_path: Path) -> None:
    plain = {k: v for k, v in sounds.GENERATION.items() if k != "no_timestamps_token_id"}
    ours = transcriber(sounds.saved_whisper(sounds.whisper(), tmp_path, plain))
    assert ours.transcribe(sounds.sound(1.0), language="en", max_tokens=3).windows == 1
    with pytest.raises(UsageError, match="there are no timestamps"):
        ours.transcribe(sounds.sound(2.5), language="en")


def test_models_that_hear_nothing(tmp_path: Path) -> None:
    cases.saved(cases.model_of("bart"), tmp_path)
    cases.save_tokenizer(tmp_path, ["<s>", "<pad>", "</s>", "<unk>"])
    with pytest.raises(UsageError, match="a bart model reads text: use kbit translate"):
        transcriber(tmp_path)


def test_features_that_do_not_fit(whisper: tuple[Path, Any], tmp_path: Path) -> None:
    import shutil

    shutil.copytree(whisper[0], tmp_path / "m")
    for text, message in (
        ('{"feature_size": 80}', "feature_size of preprocessor_config.json is 80, and num_mel_bins 20"),
        ('{"sampling_rate": 8000}', "sampling_rate of preprocessor_config.json is 8000; only 16000 is known"),
        ('{"chunk_length": 0}', "should be whole numbers above 0"),
        ("[]", "preprocessor_config.json is no JSON object"),
    ):
        (tmp_path / "m/preprocessor_config.json").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            transcriber(tmp_path / "m")


def test_features_are_those_of_transformers(whisper: tuple[Path, Any]) -> None:
    """(The extractor is transformers'; what is tested is how it is asked.)"""
    ours = transcriber(whisper[0])
    assert ours._features.of_window(sounds.sound(0.7)).shape == (sounds.FRAMES, sounds.BINS)
    assert len(ours._features.of_all(sounds.sound(3.0))) == 300
    assert np.isfinite(ours._features.of_window(np.zeros(1600, dtype=np.float32))).all()
