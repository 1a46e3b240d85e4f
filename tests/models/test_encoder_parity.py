"""Encoders and their heads are what transformers makes of the same files."""

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
from safetensors.torch import load_file, save_file

from kbit.backends.cpu.backend import NativeBackend
from kbit.backends.reference.backend import ReferenceBackend
from kbit.engine.encoder import Encoder, TokenizedText
from kbit.engine.pooling import pool
from kbit.graph.backend import Backend
from kbit.host.errors import CheckpointError, KbitError, UnsupportedError, UsageError
from kbit.models.families import FAMILIES, spec_from_config
from kbit.models.opening import open_model
from kbit.models.task_config import labels_of

pytestmark = pytest.mark.usefixtures("one_thread")

HEADS = ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


def native() -> NativeBackend:
    return NativeBackend(2, compute="fp32", kv="fp32")


def encoder(folder: Path, backend: Backend | None = None, **settings: Any) -> Encoder:
    with open_model(str(folder)) as source:
        return Encoder(source, backend or native(), **settings)


@pytest.mark.parametrize("family", cases.MODELS)
def test_hidden_states(family: str, tmp_path: Path) -> None:
    """Alone and in a ragged batch, longer than a chunk of attention and than the largest distance MPNet tells apart."""
    model = cases.model_of(family)
    cases.saved(model, tmp_path)
    texts = cases.ids_of(7, 1, 300, 150)
    wanted = [cases.states_of(model, ids) for ids in texts]
    for backend in (native(), ReferenceBackend()):
        ours = encoder(tmp_path, backend)
        for found, state in zip(ours.hidden([TokenizedText(ids) for ids in texts]), wanted, strict=True):
            assert_near(found, state)
    alone = encoder(tmp_path).hidden([TokenizedText(texts[2])])[0]
    assert np.array_equal(alone, encoder(tmp_path).hidden([TokenizedText(ids) for ids in texts])[2])


@pytest.mark.parametrize("family", ["Bert", "NomicBert"])
def test_token_types(family: str, tmp_path: Path) -> None:
    model = cases.model_of(family)
    cases.saved(model, tmp_path)
    (ids,) = cases.ids_of(9)
    types = [0] * 4 + [1] * 5
    for backend in (native(), ReferenceBackend()):
        found = encoder(tmp_path, backend).hidden([TokenizedText(ids, types), TokenizedText(ids[:3])])
        assert_near(found[0], cases.states_of(model, ids, types))
        assert_near(found[1], cases.states_of(model, ids[:3]))
    with pytest.raises(UsageError, match="token types go from 0 to 1 in this model, not to 2"):
        encoder(tmp_path).hidden([TokenizedText(ids, [2] * 9)])


@pytest.mark.parametrize("family", cases.FAMILIES)
@pytest.mark.parametrize("head", HEADS)
def test_heads(family: str, head: str, tmp_path: Path) -> None:
    if (family, head) == ("NomicBert", "ForQuestionAnswering"):
        pytest.skip("transformers has no such model")
    labels = {} if head in ("ForMaskedLM", "ForQuestionAnswering") else {"num_labels": 3}
    model = cases.model_of(family, head, **labels)
    cases.saved(model, tmp_path)
    (ids,) = cases.ids_of(23)
    with torch.no_grad():
        theirs = model(torch.tensor([ids]))
    ours = encoder(tmp_path)
    (states,) = ours.hidden([TokenizedText(ids)])
    if head == "ForMaskedLM":
        assert_near(ours.logits(states), theirs.logits[0])
    elif head == "ForSequenceClassification":
        assert_near(ours.head.scores(states[:1]), theirs.logits)
    elif head == "ForTokenClassification":
        assert_near(ours.head.scores(states), theirs.logits[0])
    else:
        assert_near(ours.head.scores(states), torch.stack([theirs.start_logits[0], theirs.end_logits[0]], -1))


def test_a_mean_is_classified_where_the_configuration_says_so(tmp_path: Path) -> None:
    changes = {"classifier_pooling": "mean", "classifier_bias": True, "classifier_activation": "relu"}
    model = cases.model_of("ModernBert", "ForSequenceClassification", num_labels=3, **changes)
    cases.saved(model, tmp_path)
    (ids,) = cases.ids_of(23)
    ours = encoder(tmp_path)
    assert ours.spec.task is not None
    (states,) = ours.hidden([TokenizedText(ids)])
    with torch.no_grad():
        wanted = model(torch.tensor([ids]), attention_mask=torch.ones(1, 23, dtype=torch.int64)).logits
    assert_near(ours.head.scores(pool(states, (ours.spec.task.pooling,))[None]), wanted)


def test_an_untied_vocabulary(tmp_path: Path) -> None:
    model = cases.model_of("Bert", "ForMaskedLM", tie_word_embeddings=False)
    cases.saved(model, tmp_path)
    (ids,) = cases.ids_of(6)
    ours = encoder(tmp_path)
    with torch.no_grad():
        assert_near(ours.logits(ours.hidden([TokenizedText(ids)])[0]), model(torch.tensor([ids])).logits[0])


def test_files_of_before_2019(tmp_path: Path) -> None:
    """BertForPreTraining, `gamma` and `beta`, buffers, and everything under the model's prefix."""
    model = cases.model_of("Bert", "ForPreTraining")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    old = {}
    for name, tensor in tensors.items():
        if "LayerNorm" in name:
            name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        old[name] = tensor
    assert any(name.endswith("gamma") for name in old)
    old["bert.embeddings.position_ids"] = torch.arange(310)[None]
    old["cls.predictions.decoder.weight"] = old["bert.embeddings.word_embeddings.weight"].clone()
    old["cls.predictions.decoder.bias"] = old["cls.predictions.bias"].clone()
    save_file(old, tmp_path / "model.safetensors")
    (ids,) = cases.ids_of(11)
    ours = encoder(tmp_path)
    (states,) = ours.hidden([TokenizedText(ids)])
    with torch.no_grad():
        theirs = model(torch.tensor([ids]), output_hidden_states=True)
    assert_near(states, theirs.hidden_states[-1][0])
    assert_near(ours.logits(states), theirs.prediction_logits[0])


def test_a_head_that_is_not_wanted_may_be_missing_or_there(tmp_path: Path) -> None:
    """all-mpnet-base-v2 calls itself MPNetForMaskedLM and has no head; and of such a model the hidden states may do."""
    model = cases.model_of("MPNet", "ForMaskedLM")
    cases.saved(model, tmp_path / "with")
    model.mpnet.save_pretrained(tmp_path / "without")
    config = json.loads((tmp_path / "without/config.json").read_text())
    (tmp_path / "without/config.json").write_text(json.dumps({**config, "architectures": ["MPNetForMaskedLM"]}))
    (ids,) = cases.ids_of(8)
    wanted = cases.states_of(model.mpnet, ids)
    for folder in ("with", "without"):
        assert_near(encoder(tmp_path / folder, headless=True).hidden([TokenizedText(ids)])[0], wanted)
    with pytest.raises(CheckpointError, match=r"5 tensors \(lm_head.dense.weight, .*\) are missing"):
        encoder(tmp_path / "without")


def test_a_text_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    cases.saved(cases.model_of("Roberta"), tmp_path)
    ours = encoder(tmp_path)
    assert ours.spec.context_length == 308
    for ids, message in (
        ([], "has no tokens"),
        ([5] * 309, "has 309 tokens, and a roberta model of this shape reads at most 308"),
        ([5, 1, 5], r"holds the padding token \(id 1\), which has no position"),
        ([5, 99], "token id 99 is outside the model's vocabulary of 99"),
    ):
        with pytest.raises(UsageError, match=message):
            ours.hidden([TokenizedText(ids)])
    assert len(ours.hidden([TokenizedText([5] * 308)])[0]) == 308


@pytest.mark.parametrize("family", ["Bert", "Roberta", "NomicBert"])
def test_triton_runs_them(family: str, tmp_path: Path) -> None:
    """To the rounding of half precision: 2^-11 for each of some ten roundings one after another."""
    pytest.importorskip("triton")
    from triton_interpreter import install

    install()
    from kbit.backends.triton.backend import TritonBackend

    model = cases.model_of(family, num_hidden_layers=1)
    cases.saved(model, tmp_path)
    texts = [TokenizedText(ids) for ids in cases.ids_of(3, 17)]
    if family != "Roberta":
        texts[0] = TokenizedText(texts[0].ids, [0, 1, 1])
    wanted = encoder(tmp_path, ReferenceBackend()).hidden(texts)
    for found, state in zip(encoder(tmp_path, TritonBackend("cpu")).hidden(texts), wanted, strict=True):
        assert_near(found, state, 10 * 2.0**-11)


@pytest.mark.parametrize(
    ("family", "what"), [("MPNet", "scores that depend on the distance"), ("ModernBert", "a window to both sides")]
)
def test_triton_refuses_by_name_what_it_lacks(family: str, what: str, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    from triton_interpreter import install

    install()
    from kbit.backends.triton.backend import TritonBackend

    cases.saved(cases.model_of(family), tmp_path)
    with pytest.raises(
        UnsupportedError, match=f"the triton backend has no attention with {what}; use --backend native"
    ):
        encoder(tmp_path, TritonBackend("cpu"))


def test_keys_that_would_make_another_model_are_refused(tmp_path: Path) -> None:
    for family, key, value in (
        ("Bert", "position_embedding_type", "relative_key"),
        ("Bert", "is_decoder", True),
        ("MPNet", "relative_attention_num_buckets", 64),
        ("NomicBert", "prenorm", True),
        ("NomicBert", "moe_every_n_layers", 2),
        ("NomicBert", "rotary_emb_fraction", 0.5),
        ("Roberta", "pad_token_id", -1),
        ("Bert", "type_vocab_size", 0),
        ("Bert", "num_labels", None),
        ("Bert", "id2label", {"0": "a", "2": "b"}),
        ("Bert", "hidden_act", "mish"),
        ("ModernBert", "classifier_pooling", "max"),
        ("ModernBert", "rope_scaling", {"rope_type": "yarn", "factor": 2.0}),
        ("DistilBert", "dim", None),
    ):
        config = cases.model_of(family).config.to_dict()
        config.update({"architectures": [f"{family}ForSequenceClassification"], key: value})
        if key == "num_labels":
            config.pop("id2label", None)
        with pytest.raises(KbitError, match=f"config.json: {'RoPE scaling' if key == 'rope_scaling' else key}"):
            spec_from_config(json.loads(json.dumps(config)))


def test_more_labels_than_names() -> None:
    """transformers 2 wrote num_labels beside the two default names; what counts is the number, as it is today."""
    config = cases.model_of("Bert").config.to_dict()
    config.update({"architectures": ["BertForSequenceClassification"], "num_labels": 50})
    config["id2label"] = {"0": "LABEL_0", "1": "LABEL_1"}
    with pytest.warns(match="num_labels is 50, but id2label names 2: they are called LABEL_0"):
        spec = spec_from_config(json.loads(json.dumps(config)))
    assert spec.task is not None
    assert spec.task.labels == 50
    labels = labels_of(config, "here")
    assert (len(labels), labels[49]) == (50, "LABEL_49")
    assert transformers.BertConfig(**config).num_labels == 50


def test_configurations_of_the_hub(tmp_path: Path) -> None:
    """nomic-embed-text-v1.5 has GPT-2's names; ModernBERT's first files have two bases of the rotation."""
    config = {
        "model_type": "nomic_bert",
        "architectures": ["NomicBertModel"],
        "activation_function": "swiglu",
        "layer_norm_epsilon": 1e-12,
        "n_embd": 768,
        "n_head": 12,
        "n_inner": 3072,
        "n_layer": 12,
        "n_positions": 8192,
        "vocab_size": 30528,
        "type_vocab_size": 2,
        "rotary_emb_base": 1000,
        "rotary_emb_fraction": 1.0,
        "prenorm": False,
    }
    spec = spec_from_config(config)
    assert (spec.activation, spec.rope.theta, spec.rope.dim, spec.context_length) == ("silu", 1000.0, 64, 8192)
    config = {
        **{key: value for key, value in cases.SIZES.items() if key != "max_position_embeddings"},
        "model_type": "modernbert",
        "architectures": ["ModernBertModel"],
        "num_hidden_layers": 5,
        "global_attn_every_n_layers": 3,
        "global_rope_theta": 120000.0,
        "local_rope_theta": 5000.0,
        "local_attention": 128,
    }
    spec = spec_from_config(config)
    assert spec.windows == (None, 65, 65, None, 65)
    assert spec.window_rope is not None
    assert (spec.rope.theta, spec.window_rope.theta) == (120000.0, 5000.0)
    assert all(family.task is None or family.mask == "bidirectional" for family in FAMILIES.values())
