"""Prepared weights of encoders and encoder-decoders: the second run maps what the first prepared, and finds the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import encoder_cases
import encoder_decoder_cases
import numpy as np
import pytest
from piece_cases import save_marian

from kbit.backends.cpu.backend import NativeBackend
from kbit.backends.cpu.prepared import PreparedSource
from kbit.engine.answer import Answerer
from kbit.engine.classify import Classifier
from kbit.engine.embed import Embedder
from kbit.engine.encoder import Encoder, TokenizedText
from kbit.engine.fill import MaskFiller
from kbit.engine.loader import load_model, open_prepared
from kbit.host.errors import CheckpointError
from kbit.models.encoder_decoder import load_encoder_decoder
from kbit.models.opening import open_model

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = "the [MASK] sat on the mat ."


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where prepared weights go in this test."""
    monkeypatch.setenv("KBIT_PREPARED", str(tmp_path / "prepared"))
    return tmp_path / "prepared"


def backend() -> NativeBackend:
    return NativeBackend(1, compute="fp32", kv="fp32")


def runs(model: Path, make: Callable[[Any, Any], Any], value: Callable[[Any], Any]) -> list[Any]:
    """A value of the model as it is without prepared weights, as they are made, and as they are found; on the last, the
    checkpoint's weights are not opened."""
    with open_model(str(model)) as source:
        found = [value(make(source, backend()))]
    for _ in range(2):
        with open_prepared(str(model), backend()) as source:
            assert isinstance(source, PreparedSource)
            found.append(value(make(source, backend())))
            assert source._original is None
    return found


def equal(found: list[Any]) -> None:
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])


@pytest.mark.parametrize("family", encoder_cases.MODELS)
def test_hidden_states(family: str, tmp_path: Path) -> None:
    """Of every family: MPNet has a table of distances, the decoders a head that goes unused."""
    model = encoder_cases.saved(encoder_cases.model_of(family), tmp_path / "m")
    ids = encoder_cases.ids_of(7)[0]

    def make(source: Any, by: Any) -> Encoder:
        return Encoder(source, by, headless=True)

    equal(runs(model, make, lambda encoder: encoder.hidden([TokenizedText(ids)])[0]))


HEADS: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "ForMaskedLM": (MaskFiller, lambda made: [one.probability for one in made.fill(TEXT, top=5)[0]]),
    "ForSequenceClassification": (Classifier, lambda made: made.label([TEXT])[0].logits),
    "ForQuestionAnswering": (Answerer, lambda made: [one.score for one in made.answer("who ?", TEXT, top=3)[0]]),
}


@pytest.mark.parametrize("head", ["ForMaskedLM", "ForSequenceClassification", "ForQuestionAnswering"])
@pytest.mark.parametrize("family", ["Bert", "MPNet"])
def test_heads(family: str, head: str, tmp_path: Path) -> None:
    model = encoder_cases.saved(encoder_cases.model_of(family, head), tmp_path / "m")
    equal(runs(model, *HEADS[head]))


def test_one_file_serves_every_command(tmp_path: Path, folder: Path) -> None:
    """What `embed` prepares holds the head that `fill` needs."""
    model = encoder_cases.saved(encoder_cases.model_of("Bert", "ForMaskedLM"), tmp_path / "m")
    with open_prepared(str(model), backend()) as source:
        Embedder(source, backend())
    files = sorted(folder.glob("*.kbit"))
    assert len(files) == 1
    equal(runs(model, *HEADS["ForMaskedLM"]))
    assert sorted(folder.glob("*.kbit")) == files


def test_what_embed_prepares_of_a_decoder_continues_texts(tmp_path: Path, tiny_model: Path) -> None:
    """The head is in it, and where it is said to be tied, it was compared."""
    with open_prepared(str(tiny_model), backend()) as source:
        file = source.prepared  # type: ignore[attr-defined]
        Encoder(source, backend(), headless=True)
    assert load_model(str(tiny_model), threads=1).prepared == file


def test_without_the_head_that_the_configuration_names(tmp_path: Path) -> None:
    """all-mpnet-base-v2 is published so: hidden states are there, and the head is missed by name."""
    from safetensors.torch import load_file, save_file

    model = encoder_cases.saved(encoder_cases.model_of("MPNet", "ForMaskedLM"), tmp_path / "m")
    weights = load_file(model / "model.safetensors")
    save_file({n: t for n, t in weights.items() if not n.startswith("lm_head")}, model / "model.safetensors")
    ids = encoder_cases.ids_of(7)[0]

    def make(source: Any, by: Any) -> Encoder:
        return Encoder(source, by, headless=True)

    equal(runs(model, make, lambda encoder: encoder.hidden([TokenizedText(ids)])[0]))
    with open_prepared(str(model), backend()) as source, pytest.raises(CheckpointError, match="lm_head.* missing"):
        MaskFiller(source, backend())


@pytest.mark.parametrize("name", encoder_decoder_cases.MODELS)
def test_encoder_decoders(name: str, tmp_path: Path) -> None:
    """T5 has tables of distances, Marian and BART what is added to logits."""
    model = encoder_decoder_cases.saved(encoder_decoder_cases.model_of(name), tmp_path / "m")
    sources = encoder_decoder_cases.ids_of(5, 9)

    def value(model: Any) -> Any:
        from kbit.graph.batch import Batch

        return model.run(Batch.of([[1, 2], [3]], [0, 0], "all"), model.encode(sources, 4))

    equal(runs(model, load_encoder_decoder, value))


def test_a_module_that_changes_is_noticed(tmp_path: Path, folder: Path) -> None:
    """Dense layers of sentence-transformers are in folders of their own."""
    model = encoder_cases.saved(encoder_cases.model_of("Bert"), tmp_path / "m")
    (model / "1_Pooling").mkdir()
    pooling = model / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps({"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}))
    kinds = {"0": ("", "Transformer"), "1": ("1_Pooling", "Pooling")}
    modules = [
        {"idx": int(at), "name": at, "path": path, "type": f"sentence_transformers.models.{kind}"}
        for at, (path, kind) in kinds.items()
    ]
    (model / "modules.json").write_text(json.dumps(modules))

    def vector() -> Any:
        with open_prepared(str(model), backend()) as source:
            return Embedder(source, backend()).embed(["the cat sat on the mat"]).vectors

    mean = vector()
    pooling.write_text(json.dumps({"word_embedding_dimension": 32, "pooling_mode_cls_token": True}))
    assert not np.allclose(vector(), mean)
    pooling.write_text(json.dumps({"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}))
    np.testing.assert_array_equal(vector(), mean)


def test_sentencepiece_of_marian_is_among_the_files(tmp_path: Path) -> None:
    model = encoder_decoder_cases.saved(encoder_decoder_cases.model_of("marian"), tmp_path / "m")
    save_marian(model)
    names = []
    for _ in range(2):
        with open_prepared(str(model), backend()) as source:
            names.append(source.prepared)  # type: ignore[attr-defined]
            assert source.sidecar_files()["source.spm"] == (model / "source.spm").read_bytes()
        (model / "source.spm").write_bytes((model / "source.spm").read_bytes() + b"\0")
    assert names[0] != names[1]
