"""Masked words, labels and answers are what transformers makes of the same files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import encoder_cases as cases
import numpy as np
import pytest
import torch
import transformers
from encoder_cases import assert_near

from kbit.backends.cpu.backend import NativeBackend
from kbit.engine.answer import Answerer
from kbit.engine.classify import Classifier
from kbit.engine.fill import MaskFiller
from kbit.host.errors import UnsupportedError, UsageError
from kbit.models.opening import open_model

pytestmark = pytest.mark.usefixtures("one_thread")

NAMED = {"id2label": {0: "O", 1: "B-PET", 2: "I-PET"}, "label2id": {"O": 0, "B-PET": 1, "I-PET": 2}}
LONG = " ".join(["the cats sat on a mat .", "a dog ran far away slowly .", "who sat on the mats ?"] * 12)


def opened(folder: Path, make: Any) -> Any:
    with open_model(str(folder)) as source:
        return make(source, NativeBackend(2, compute="fp32", kv="fp32"))


def tokenizer_of(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_masked_words(tmp_path: Path) -> None:
    model = cases.model_of("Bert", "ForMaskedLM")
    cases.saved(model, tmp_path)
    text = "the [MASK] sat on the [MASK] ."
    found = opened(tmp_path, MaskFiller).fill(text, top=4)
    judge = transformers.pipeline("fill-mask", model=model, tokenizer=tokenizer_of(tmp_path), top_k=4)(text)
    for ours, theirs in zip(found, judge, strict=True):
        assert [filling.token_id for filling in ours] == [one["token"] for one in theirs]
        assert_near([filling.probability for filling in ours], [one["score"] for one in theirs])
        assert [filling.token for filling in ours] == [one["token_str"].strip() for one in theirs]
    with pytest.raises(UsageError, match=r"nothing is masked in the text: write \[MASK\]"):
        opened(tmp_path, MaskFiller).fill("the cat")
    with pytest.raises(UnsupportedError, match="has no head that gives labels"):
        opened(tmp_path, Classifier)


@pytest.mark.parametrize("family", ["Bert", "Roberta", "DistilBert", "ModernBert"])
def test_labels_of_texts_and_pairs(family: str, tmp_path: Path) -> None:
    model = cases.model_of(family, "ForSequenceClassification", **NAMED)
    cases.saved(model, tmp_path)
    texts, pairs = ["the cat sat", "a dog ran far away"], ["on the mat .", "who ?"]
    ours = opened(tmp_path, Classifier)
    assert ours.labels == ("O", "B-PET", "I-PET")
    tokenizer = tokenizer_of(tmp_path)
    for second in (None, pairs):
        for index, one in enumerate(ours.label(texts, second)):
            both = (texts[index],) if second is None else (texts[index], second[index])
            read = tokenizer(*both, return_tensors="pt")
            if family != "Bert":
                read.pop("token_type_ids", None)
            with torch.no_grad():
                logits = model(**read).logits[0]
            assert_near(one.logits, logits)
            assert_near(one.scores, torch.softmax(logits, -1))
            assert (one.tokens, one.cut) == (read["input_ids"].shape[1], False)
    assert ours.label([LONG * 3])[0].cut


@pytest.mark.parametrize(
    ("changes", "scores"),
    [
        ({"num_labels": 1}, torch.sigmoid),
        ({"num_labels": 1, "problem_type": "regression"}, lambda x: x),
        (
            {"num_labels": 1, "sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}},
            lambda x: x,
        ),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, torch.sigmoid),
    ],
)
def test_what_scores_mean(changes: dict[str, Any], scores: Any, tmp_path: Path) -> None:
    """A reranker's one label, numbers, and labels that do not exclude each other."""
    model = cases.model_of("Bert", "ForSequenceClassification", **changes)
    cases.saved(model, tmp_path)
    (one,) = opened(tmp_path, Classifier).label(["who sat ?"], ["the cat ."])
    with torch.no_grad():
        logits = model(**tokenizer_of(tmp_path)("who sat ?", "the cat .", return_tensors="pt")).logits[0]
    assert_near(one.logits, logits)
    assert_near(one.scores, scores(logits))


@pytest.mark.parametrize("aggregation", ["none", "simple", "first", "average", "max"])
def test_labels_of_words(aggregation: str, tmp_path: Path) -> None:
    """As TokenClassificationPipeline groups them. (Pieces of words: "cats" is cat, ##s.)"""
    model = cases.model_of("Bert", "ForTokenClassification", **NAMED)
    with torch.no_grad():
        model.classifier.weight.mul_(0.2)  # close calls, so that all labels come up
    cases.saved(model, tmp_path)
    text = "the cats sat on a mat . slowly the dogs ran far away , who ?"
    ours = opened(tmp_path, Classifier).entities(text, aggregation)
    judge = transformers.pipeline(
        "token-classification", model=model, tokenizer=tokenizer_of(tmp_path), aggregation_strategy=aggregation
    )(text)
    key = "entity" if aggregation == "none" else "entity_group"
    assert [(one.label, one.start, one.stop) for one in ours] == [(one[key], one["start"], one["end"]) for one in judge]
    assert_near([one.score for one in ours], [one["score"] for one in judge])
    assert len({one.label for one in ours}) >= 1
    assert all(one.text == text[one.start : one.stop] for one in ours)


def test_words_of_a_long_text_are_labelled_where_windows_know_most_of_them(tmp_path: Path) -> None:
    model = cases.model_of("Bert", "ForTokenClassification", max_position_embeddings=40, **NAMED)
    cases.saved(model, tmp_path)
    ours = opened(tmp_path, Classifier)
    found = ours.entities(LONG, "none", overlap=10, ignored=())
    tokenizer = tokenizer_of(tmp_path)
    assert [(one.start, one.stop) for one in found] == tokenizer(
        LONG, add_special_tokens=False, return_offsets_mapping=True
    )["offset_mapping"]
    windows = tokenizer(LONG, max_length=40, truncation=True, stride=10, return_overflowing_tokens=True)["input_ids"]
    with torch.no_grad():
        first = torch.softmax(model(torch.tensor([windows[0]])).logits[0], -1)
        second = torch.softmax(model(torch.tensor([windows[1]])).logits[0], -1)
    # Tokens 28..37 are in both windows, at 29..38 and 1..10: half of them count in each.
    assert_near(found[27].score, first[28].max())
    assert_near(found[30].score, first[31].max())
    assert_near(found[36].score, second[9].max())
    with pytest.raises(UsageError, match="this model labels words"):
        ours.label(["the cat"])


def test_answers(tmp_path: Path) -> None:
    """The best stretch of a context that fits, and of one that is read in windows, by brute force over transformers'
    logits."""
    model = cases.model_of("Bert", "ForQuestionAnswering")
    cases.saved(model, tmp_path)
    question, tokenizer, ours = "who sat ?", tokenizer_of(tmp_path), opened(tmp_path, Answerer)
    for context, window in (("the cats sat on a mat . a dog ran far away", 384), (LONG, 50)):
        best: dict[tuple[int, int], float] = {}
        read = tokenizer(
            question,
            context,
            max_length=window,
            truncation="only_second",
            stride=12,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        for index, ids in enumerate(read["input_ids"]):
            with torch.no_grad():
                out = model(torch.tensor([ids]), token_type_ids=torch.tensor([read["token_type_ids"][index]]))
            places = [at for at, part in enumerate(read.sequence_ids(index)) if part == 1]
            starts, stops = (torch.softmax(x[0][places], -1).double() for x in (out.start_logits, out.end_logits))
            for i in range(len(places)):
                for j in range(i, min(i + 5, len(places))):
                    offsets = read["offset_mapping"][index]
                    span = (offsets[places[i]][0], offsets[places[j]][1])
                    best[span] = max(best.get(span, 0.0), float(starts[i] * stops[j]))
        wanted = sorted(best.items(), key=lambda item: -item[1])[:3]
        found, windows = ours.answer(question, context, top=3, longest_answer=5, window=window, overlap=12)
        assert windows == len(read["input_ids"])
        assert [(one.start, one.stop) for one in found] == [span for span, _ in wanted]
        assert_near([one.score for one in found], [score for _, score in wanted])
        assert found[0].text == context[found[0].start : found[0].stop]
    with pytest.raises(UsageError, match="windows of 8 tokens leave 2 for the text"):
        ours.answer(question, LONG, window=8)


def test_there_may_be_no_answer(tmp_path: Path) -> None:
    model = cases.model_of("Bert", "ForQuestionAnswering")
    cases.saved(model, tmp_path)
    question, context, ours = "who sat ?", "the cats sat on a mat .", opened(tmp_path, Answerer)
    read = tokenizer_of(tmp_path)(question, context, return_tensors="pt")
    with torch.no_grad():
        out = model(**read)
    counted = [0, *(at for at, part in enumerate(read.sequence_ids(0)) if part == 1)]
    nothing = torch.softmax(out.start_logits[0][counted], -1)[0] * torch.softmax(out.end_logits[0][counted], -1)[0]
    found, _ = ours.answer(question, context, top=100, may_be_absent=True)
    (none,) = [one for one in found if one.stop == 0]
    assert none.text == ""
    assert_near([none.score], [nothing])
    assert all(one.stop for one in ours.answer(question, context, top=100)[0])


@pytest.mark.parametrize("types", [True, False])
def test_token_types_are_given_to_models_that_take_them(types: bool, tmp_path: Path) -> None:
    model = cases.model_of("Bert", "ForSequenceClassification")
    cases.saved(model, tmp_path)
    cases.save_tokenizer(tmp_path, types=types)
    read = tokenizer_of(tmp_path)("who sat ?", "the cat .", return_tensors="pt")
    assert ("token_type_ids" in read) == types
    with torch.no_grad():
        assert_near(opened(tmp_path, Classifier).label(["who sat ?"], ["the cat ."])[0].logits, model(**read).logits[0])


def test_labels_without_names(tmp_path: Path) -> None:
    cases.saved(cases.model_of("Bert", "ForSequenceClassification"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("id2label", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours = opened(tmp_path, Classifier)
    assert ours.labels == ("LABEL_0", "LABEL_1")
    assert np.isclose(sum(ours.label(["the cat"])[0].scores), 1.0)
