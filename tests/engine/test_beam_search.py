"""Generated texts are those of transformers, token for token: greedy and with beams, under every rule."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import encoder_decoder_cases as cases
import pytest

from kbit.backends.reference.backend import ReferenceBackend
from kbit.engine.beam_search import write
from kbit.engine.generation_settings import GenerationSettings, read_settings
from kbit.host.errors import CheckpointError, UnsupportedError, UsageError
from kbit.models.opening import open_model

pytestmark = pytest.mark.usefixtures("one_thread")


def settings_of(folder: Path, **changes: Any) -> GenerationSettings:
    path = folder / "generation_config.json"
    given = json.loads(path.read_text())
    path.write_text(json.dumps({**given, **changes}))
    with open_model(str(folder)) as source:
        return read_settings(source, cases.VOCABULARY)


@pytest.mark.parametrize("name", cases.MODELS)
@pytest.mark.parametrize("beams", [1, 4])
def test_texts_are_those_of_transformers(name: str, beams: int, tmp_path: Path) -> None:
    model = cases.model_of(name)
    cases.saved(model, tmp_path)
    sources = cases.ids_of(7, 1, 30)
    wanted = cases.generated(model, sources, num_beams=beams, max_length=24)
    settings = settings_of(tmp_path, num_beams=beams, max_length=24)
    found = write(cases.loaded(tmp_path), sources, settings)
    assert [list(text.ids) for text in found] == wanted
    assert all(text.finished == (text.ids[-1] in settings.ends) for text in found)


RULES: dict[str, dict[str, Any]] = {
    "ngrams": {"no_repeat_ngram_size": 2},
    "ngrams of the source": {"encoder_no_repeat_ngram_size": 1},
    "long": {"length_penalty": 2.0, "early_stopping": "never"},
    "short": {"length_penalty": -1.0, "early_stopping": True},
    "at least": {"min_length": 12},
    "at least new": {"min_new_tokens": 12},
    "repetition": {"repetition_penalty": 1.7},
    "words": {"bad_words_ids": [[5], [6, 7], [2]]},
    "suppressed": {"suppress_tokens": [8, 9], "begin_suppress_tokens": [10, 11]},
    "forced": {"forced_bos_token_id": 33, "forced_eos_token_id": 2, "renormalize_logits": True},
    "several ends": {"eos_token_id": [2, 40, 41, 42]},
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("beams", [1, 3])
def test_rules(rule: str, beams: int, tmp_path: Path) -> None:
    """With ends that are likely, so that texts end before they are cut off."""
    model = cases.model_of("bart", forced_eos_token_id=None)
    model.final_logits_bias[0, 2] += 3.0
    cases.saved(model, tmp_path)
    sources = cases.ids_of(7, 12, 30)
    wanted = cases.generated(model, sources, num_beams=beams, max_length=20, **RULES[rule])
    settings = settings_of(tmp_path, num_beams=beams, max_length=20, **RULES[rule])
    assert [list(text.ids) for text in write(cases.loaded(tmp_path), sources, settings)] == wanted


def test_beams_on_the_reference_backend(tmp_path: Path) -> None:
    model = cases.model_of("t5")
    cases.saved(model, tmp_path)
    sources = cases.ids_of(9, 5)
    settings = settings_of(tmp_path, num_beams=3, max_length=80)
    found = write(cases.loaded(tmp_path, ReferenceBackend()), sources, settings)
    assert [list(text.ids) for text in found] == cases.generated(model, sources, num_beams=3, max_length=80)


def test_many_sources_are_those_alone(tmp_path: Path) -> None:
    """More than go through the model together, in whatever order."""
    cases.saved(cases.model_of("marian"), tmp_path)
    ours, settings = cases.loaded(tmp_path), settings_of(tmp_path, num_beams=2, max_length=9)
    sources = cases.ids_of(*(3 + 7 * index % 11 for index in range(40)))
    together = write(ours, sources, settings)
    assert together == [write(ours, [source], settings)[0] for source in sources]


def test_beams_share_pages(tmp_path: Path) -> None:
    """Those of the source are shared by all; those of the text are copied when two beams part."""
    cases.saved(cases.model_of("t5"), tmp_path)
    ours = cases.loaded(tmp_path)
    cache = ours.encode(cases.ids_of(130), 70)
    cache.select([0, 0, 0])
    assert cache.encoder is not None
    assert len({tuple(row.pages) for row in cache.encoder.rows}) == 1
    assert {cache.encoder.pool.uses(page) for page in cache.encoder.rows[0].pages} == {3}


def test_settings_of_old_configurations(tmp_path: Path) -> None:
    """Keys of config.json count where there is no generation_config.json."""
    cases.saved(cases.model_of("bart"), tmp_path)
    (tmp_path / "generation_config.json").unlink()
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    old = {"num_beams": 4, "max_length": 142, "min_length": 56, "no_repeat_ngram_size": 3, "length_penalty": 2.0}
    path.write_text(json.dumps({**config, **old, "force_bos_token_to_be_generated": True, "early_stopping": True}))
    with open_model(str(tmp_path)) as source:
        found = read_settings(source, cases.VOCABULARY)
        task = read_settings(source, cases.VOCABULARY, {"num_beams": 6})
    wanted = GenerationSettings(2, (2,), 142, 4, 2.0, True, forced_first=0, forced_last=(2,), shortest=56, no_repeat=3)
    assert found == wanted
    assert task == replace(wanted, beams=6)


def test_what_is_refused(tmp_path: Path) -> None:
    cases.saved(cases.model_of("t5"), tmp_path)
    for change, error, message in (
        ({"do_sample": True}, UnsupportedError, "generation_config.json: do_sample True is not supported; remove"),
        ({"num_beam_groups": 2}, UnsupportedError, "num_beam_groups 2 is not supported"),
        ({"bad_words_ids": [[99]]}, CheckpointError, r"bad_words_ids is \[\[99\]\]; it should be ids of tokens"),
        ({"early_stopping": "soon"}, CheckpointError, "early_stopping is 'soon'"),
        ({"num_beams": 0}, CheckpointError, "num_beams is 0"),
    ):
        kept = (tmp_path / "generation_config.json").read_text()
        with pytest.raises(error, match=message):
            settings_of(tmp_path, **change)
        (tmp_path / "generation_config.json").write_text(kept)
    ours, settings = cases.loaded(tmp_path), settings_of(tmp_path)
    with pytest.raises(UsageError, match="use --max-tokens 16383"):
        write(ours, cases.ids_of(3), replace(settings, longest=20000))
