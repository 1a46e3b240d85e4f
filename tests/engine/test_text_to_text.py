"""Texts in, texts out, as transformers' tokenizers and `generate` make them; languages, tasks, long texts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import encoder_decoder_cases as cases
import pytest
import torch
from piece_cases import SPACE, save_m2m, save_marian, save_t5

from kbit.engine.text_to_text import TextToText
from kbit.host.errors import UsageError
from kbit.models.opening import open_model
from kbit.text.languages import Prompted, prompted_for_languages
from kbit.text.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

TASKS = {
    "summarization": {"prefix": "summarize: ", "num_beams": 3, "max_length": 15, "no_repeat_ngram_size": 2},
    "translation_en_to_de": {"prefix": "translate a : ", "num_beams": 2, "max_length": 9},
}
TEXTS = ["the cat sat on the mat .", "a dog ran far away"]


def model_in(folder: Path, **settings: Any) -> TextToText:
    with open_model(str(folder)) as source:
        return TextToText(source, cases.native(), **settings)


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder, model = tmp_path_factory.mktemp("t5"), cases.model_of("t5")
    cases.saved(model, folder)
    cases.save_tokenizer(folder, ["<pad>", "</s>", "<unk>"])
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "task_specific_params": TASKS}))
    return folder, model


@pytest.mark.parametrize("task", [None, "summarization", "translation"])
def test_texts_are_those_of_transformers(task: str | None, t5: tuple[Path, Any]) -> None:
    from transformers import PreTrainedTokenizerFast

    folder, model = t5
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    keys = {} if task is None else dict(TASKS["summarization" if task == "summarization" else "translation_en_to_de"])
    prefix = keys.pop("prefix", "")
    ours = model_in(folder, task=task, languages=("en", "de") if task == "translation" else (None, None))
    settings = ours.with_settings(max_tokens=12) if task is None else ours.with_settings()
    keys = keys or {"max_length": 13}
    for text, found in zip(TEXTS, ours.answer(TEXTS, settings), strict=True):
        ids = theirs(prefix + text)["input_ids"]
        (wanted,) = cases.generated(model, [ids], **keys)
        assert list(found.ids) == wanted
        assert found.text == theirs.decode(wanted, skip_special_tokens=True)
        assert (found.source_tokens, found.cut) == (len(ids), 0)


def test_a_folder_with_pieces_alone(t5: tuple[Path, Any], tmp_path: Path) -> None:
    shutil.copytree(t5[0], tmp_path / "m")
    (tmp_path / "m/tokenizer.json").unlink()
    save_t5(tmp_path / "m")
    ours = model_in(tmp_path / "m")
    assert ours.encode("the cat") == [3, 4, 1]
    assert ours.tokenizer.token_id("<extra_id_0>") == ours.tokenizer.vocab_size - 1


def test_settings_that_a_user_changes(t5: tuple[Path, Any]) -> None:
    ours = model_in(t5[0], task="summarization")
    assert (ours.settings.beams, ours.settings.longest) == (3, 15)
    changed = ours.with_settings(beams=1, max_tokens=4, length_penalty=0.5)
    assert (changed.beams, changed.longest, changed.length_penalty, changed.no_repeat) == (1, 5, 0.5, 2)
    with pytest.raises(UsageError, match="0 beams"):
        ours.with_settings(beams=0)


def test_pairs_of_languages_that_t5_has(t5: tuple[Path, Any]) -> None:
    with pytest.raises(UsageError, match="--from en --to fr: config.json describes no such translation, but en to de"):
        model_in(t5[0], task="translation", languages=("en", "fr"))


def test_long_texts(tmp_path: Path) -> None:
    """What is behind a text stays behind its beginning."""
    cases.saved(cases.model_of("marian", max_position_embeddings=12), tmp_path)
    vocabulary = save_marian(tmp_path)
    ours = model_in(tmp_path)
    text = "the cat sat on a mat " * 4
    settings = ours.with_settings()
    assert settings.longest == 12
    with pytest.raises(UsageError, match="text 2 has 25 tokens, and this marian model reads at most 12"):
        ours.answer(["the", text], settings)
    _, found = ours.answer(["the", text], settings, "truncate")
    assert (found.source_tokens, found.cut) == (12, 13)
    kept = [*ours.encode(text)[:11], vocabulary["</s>"]]
    assert ours._shortened(ours.encode(text), 1, "truncate") == kept


def prompted(
    folder: Path,
    family: str,
    languages: tuple[str | None, str | None],
    settings: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Prompted:
    if not (folder / "config.json").exists():
        (folder / "config.json").write_text('{"model_type": "bart"}')
        from safetensors.torch import save_file

        save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
    from kbit.checkpoint.resolve import open_model as open_plain

    with open_plain(str(folder)) as source:
        tokenizer = Tokenizer.from_source(source)
    return prompted_for_languages(family, tokenizer, config or {}, settings or {}, *languages, "m")


def test_languages_of_m2m_100(tmp_path: Path) -> None:
    ids = save_m2m(tmp_path)
    found = prompted(tmp_path, "m2m_100", ("en", "fr"))
    assert (found.before, found.after) == ((ids["__en__"],), (ids["</s>"],))
    assert found.generation == {"forced_bos_token_id": ids["__fr__"]}
    with pytest.raises(UsageError, match="--to xx: is no language of this model, which has de, en, fr"):
        prompted(tmp_path, "m2m_100", ("en", "xx"))
    with pytest.raises(UsageError, match="--to is missing; this model has de, en, fr"):
        prompted(tmp_path, "m2m_100", ("en", None))


def test_languages_of_nllb(tmp_path: Path) -> None:
    """By whole codes and by what is enough of them; where the tokenizer says so, in the order of old."""
    special, codes = ["<s>", "<pad>", "</s>", "<unk>"], ["eng_Latn", "fra_Latn", "srp_Cyrl", "srp_Latn"]
    cases.save_tokenizer(tmp_path, special, languages=codes)
    eng, fra = 95, 96
    for spoken, written in (("eng_Latn", "fra_Latn"), ("eng", "fra")):
        found = prompted(tmp_path, "m2m_100", (spoken, written))
        assert (found.before, found.after, found.generation) == ((eng,), (2,), {"forced_bos_token_id": fra})
    old = prompted(tmp_path, "m2m_100", ("eng", "fra"), {"legacy_behaviour": True})
    assert (old.before, old.after) == ((), (2, eng))
    assert prompted(tmp_path, "m2m_100", (None, "fra"), {"src_lang": "eng_Latn"}).before == (eng,)
    with pytest.raises(UsageError, match="--to srp: is srp_Cyrl or srp_Latn"):
        prompted(tmp_path, "m2m_100", ("eng", "srp"))


def test_languages_of_mbart(tmp_path: Path) -> None:
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    cases.save_tokenizer(tmp_path, special, languages=["en_XX", "ro_RO"])
    later = prompted(tmp_path, "mbart", ("en", "ro"), {"tokenizer_class": "MBart50Tokenizer"})
    assert (later.before, later.after, later.generation) == ((97,), (2,), {"forced_bos_token_id": 98})
    for config, wanted in (({"decoder_start_token_id": 2}, later), ({"tokenizer_class": "MBart50Tokenizer"}, later)):
        assert prompted(tmp_path, "mbart", ("en", "ro"), {}, config) == wanted
    first = prompted(tmp_path, "mbart", ("en_XX", "ro_RO"), {"tokenizer_class": "MBartTokenizer"})
    assert prompted(tmp_path, "mbart", ("en", "ro"), {}, {"decoder_start_token_id": 98}) == first
    assert (first.before, first.after, first.generation) == ((), (2, 97), {"decoder_start_token_id": 98})


def test_languages_of_marian(tmp_path: Path) -> None:
    one, several = tmp_path / "one", tmp_path / "several"
    one.mkdir()
    several.mkdir()
    save_marian(one)
    about = {"source_lang": "en", "target_lang": "de"}
    assert prompted(one, "marian", (None, None), about) == prompted(one, "marian", ("en", "de"), about) == Prompted()
    with pytest.raises(UsageError, match="--to fr: this model translates to de only"):
        prompted(one, "marian", ("en", "fr"), about)
    save_marian(several, codes=("deu", "fra"))
    assert prompted(several, "marian", (None, "fra"), about).words == ">>fra<< "
    for target, message in ((None, "--to is missing; this model writes deu, fra"), ("spa", "--to spa: this model wri")):
        with pytest.raises(UsageError, match=message):
            prompted(several, "marian", (None, target), about)


def test_models_without_languages(tmp_path: Path) -> None:
    cases.save_tokenizer(tmp_path, ["<s>", "<pad>", "</s>", "<unk>"])
    with pytest.raises(UsageError, match="a bart model knows no languages: leave out --from and --to"):
        prompted(tmp_path, "bart", ("en", "de"))


def test_a_translation_by_marian(tmp_path: Path) -> None:
    """From text to text through two files of pieces; the padding with which it begins is never written."""
    model = cases.model_of("marian")
    model.generation_config.bad_words_ids = [[98]]
    cases.saved(model, tmp_path)
    vocabulary = save_marian(tmp_path)
    ours = model_in(tmp_path, task="translation")
    assert ours.encode("the cat") == [vocabulary[f"{SPACE}the"], vocabulary[f"{SPACE}cat"], 0]
    (found,) = ours.answer(["the cat sat on the mat"], ours.with_settings(beams=4, max_tokens=11))
    (wanted,) = cases.generated(model, [ours.encode("the cat sat on the mat")], num_beams=4, max_length=12)
    assert list(found.ids) == wanted
    assert 98 not in found.ids[1:]
