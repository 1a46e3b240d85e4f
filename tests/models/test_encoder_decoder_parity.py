"""Encoder-decoders are what transformers makes of the same files: states, logits, pieces, batches and caches."""

from __future__ import annotations

import json
from pathlib import Path

import encoder_decoder_cases as cases
import numpy as np
import pytest
import torch
import transformers
from encoder_decoder_cases import assert_near
from safetensors.torch import load_file, save_file

from kbit.backends.reference.backend import ReferenceBackend
from kbit.graph.batch import Batch
from kbit.host.errors import CheckpointError, UnsupportedError, UsageError
from kbit.host.notes import KbitNote
from kbit.models.distances import buckets_of
from kbit.models.families import spec_from_config
from kbit.models.sinusoids import sinusoids

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", cases.MODELS)
def test_states_and_logits(name: str, tmp_path: Path) -> None:
    """A ragged batch, texts at once, in pieces and a token at a time; longer than a page and than any distance."""
    model = cases.model_of(name)
    cases.saved(model, tmp_path)
    sources, texts = cases.ids_of(7, 1, 150), cases.ids_of(70, 70, 70, seed=5)
    wanted = [cases.theirs(model, *pair) for pair in zip(sources, texts, strict=True)]
    for backend in (cases.native(), ReferenceBackend()):
        ours = cases.loaded(tmp_path, backend)
        for found, (states, _) in zip(ours.states(sources), wanted, strict=True):
            assert_near(found, states)
        cache = ours.encode(sources, 70)
        parts = []
        for begin, end in ((0, 66), (66, 69), (69, 70)):
            batch = Batch.of([text[begin:end] for text in texts], cache.lengths, "all")
            parts.append(np.split(ours.run(batch, cache), 3))
        for row, (_, logits) in enumerate(wanted):
            assert_near(np.concatenate([part[row] for part in parts]), logits)


@pytest.mark.parametrize("name", ["t5", "marian"])
def test_a_row_does_not_depend_on_the_batch(name: str, tmp_path: Path) -> None:
    cases.saved(cases.model_of(name), tmp_path)
    ours, sources, texts = cases.loaded(tmp_path), cases.ids_of(9, 80), cases.ids_of(5, 5, seed=6)
    together = ours.encode(sources, 5)
    both = ours.run(Batch.of(texts, together.lengths, "all"), together)
    alone = ours.encode(sources[1:], 5)
    assert np.array_equal(both[5:], ours.run(Batch.of(texts[1:], alone.lengths, "all"), alone))


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_narrow_caches(name: str, tmp_path: Path) -> None:
    """Keys and values of 8 bits, of both texts, change logits by about a percent; of 2 bits by more than of 8."""
    cases.saved(cases.model_of(name, **({"d_kv": 16} if name == "t5" else {})), tmp_path)
    (source,), (text,) = cases.ids_of(100), cases.ids_of(40, seed=5)
    found = {}
    for kv in ("fp32", "8", "2"):
        ours = cases.loaded(tmp_path, cases.native(kv))
        cache = ours.encode([source], 40)
        found[kv] = ours.run(Batch.of([text], cache.lengths, "all"), cache)
    size = float(np.abs(found["fp32"]).max())
    errors = {kv: float(np.abs(found[kv] - found["fp32"]).max()) / size for kv in ("8", "2")}
    assert 0.0 < errors["8"] < 0.1
    assert errors["8"] < errors["2"]


@pytest.mark.parametrize("family", ["t5", "mt5", "umt5", "marian", "bart", "mbart", "m2m_100", "pegasus"])
def test_absent_keys_take_transformers_defaults(family: str) -> None:
    """The configuration that transformers writes in full means the same as the sparse one."""
    sizes = (
        {"d_ff": 37, "num_layers": 3, "num_heads": 2}
        if family in ("t5", "mt5", "umt5")
        else {
            f"{stack}_{key}": value
            for stack in ("encoder", "decoder")
            for key, value in (("layers", 3), ("ffn_dim", 37), ("attention_heads", 2))
        }
    )
    sparse = {"model_type": family, "vocab_size": 99, "d_model": 32, **sizes}
    full = transformers.AutoConfig.for_model(family, **{k: v for k, v in sparse.items() if k != "model_type"})
    assert spec_from_config(sparse) == spec_from_config(full.to_dict())


def test_a_tied_head_of_t5_scales_logits(tmp_path: Path) -> None:
    config = json.loads((cases.saved(cases.model_of("t5"), tmp_path) / "config.json").read_text())
    assert spec_from_config(config).logit_multiplier == pytest.approx(32**-0.5)
    assert spec_from_config({**config, "scale_decoder_outputs": False}).logit_multiplier == 1.0
    config.pop("scale_decoder_outputs", None)
    assert spec_from_config({**config, "tie_word_embeddings": False}).logit_multiplier == 1.0


def test_a_head_of_its_own_that_is_called_tied(tmp_path: Path) -> None:
    """As transformers 5 saves FLAN: tie_word_embeddings is true, and scale_decoder_outputs says what that meant."""
    model = cases.model_of("flan-t5")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["tie_word_embeddings"], config["scale_decoder_outputs"]) == (True, False)
    (source,), (text,) = cases.ids_of(9), cases.ids_of(4, seed=5)
    with pytest.warns(KbitNote, match="lm_head.weight is stored and differs from shared.weight"):
        ours = cases.loaded(tmp_path)
    cache = ours.encode([source], 4)
    assert_near(ours.run(Batch.of([text], cache.lengths, "all"), cache), cases.theirs(model, source, text)[1])


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_copies_of_the_embedding(name: str, tmp_path: Path) -> None:
    """As files of before have it: under every name; and under another name alone."""
    model = cases.model_of(name)
    cases.saved(model, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    prefix = "model." if name == "bart" else ""
    embedding = tensors.pop(f"{prefix}shared.weight")
    (source,), (text,) = cases.ids_of(9), cases.ids_of(4, seed=5)
    _, wanted = cases.theirs(model, source, text)

    def logits() -> object:
        ours = cases.loaded(tmp_path)
        cache = ours.encode([source], 4)
        return ours.run(Batch.of([text], cache.lengths, "all"), cache)

    copies = [f"{prefix}encoder.embed_tokens.weight", f"{prefix}decoder.embed_tokens.weight", "lm_head.weight"]
    for names in (copies[:1], [f"{prefix}shared.weight", *copies]):
        save_file({**tensors, **{name: embedding.clone() for name in names}}, file, {"format": "pt"})
        assert_near(logits(), wanted)
    other = {**tensors, f"{prefix}shared.weight": embedding, copies[0]: embedding + 1}
    save_file(other, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="embed_tokens.weight differs from .*shared.weight"):
        logits()


def test_names_without_the_models_prefix(tmp_path: Path) -> None:
    """`BartModel` saves `shared.weight`, and no bias of logits."""
    model = cases.model_of("bart")
    model.final_logits_bias.zero_()
    model.model.save_pretrained(tmp_path)
    (source,), (text,) = cases.ids_of(9), cases.ids_of(4, seed=5)
    ours = cases.loaded(tmp_path)
    cache = ours.encode([source], 4)
    assert_near(ours.run(Batch.of([text], cache.lengths, "all"), cache), cases.theirs(model, source, text)[1])


def test_stored_tables_of_sines(tmp_path: Path) -> None:
    """Pegasus' are stored, and are what is computed, or the checkpoint is refused."""
    cases.saved(cases.model_of("pegasus"), tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = "model.encoder.embed_positions.weight"
    assert_near(sinusoids(310, 32, "marian"), tensors[name].numpy(), 1e-6)
    save_file({**tensors, name: tensors[name] + 0.1}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"encoder.embed_positions.weight is not the table of sines"):
        cases.loaded(tmp_path)


def test_sines_of_fairseq() -> None:
    from transformers.models.m2m_100.modeling_m2m_100 import M2M100SinusoidalPositionalEmbedding as Theirs

    wanted = Theirs.get_embedding(1026, 64).numpy()
    # One rounding of a frequency, times the position, is an angle's error.
    assert float(np.abs(sinusoids(1026, 64, "fairseq") - wanted).max()) <= 1026 * 2.0**-23


@pytest.mark.parametrize("causal", [False, True])
def test_buckets(causal: bool) -> None:
    from transformers.models.t5.modeling_t5 import T5Attention

    distances = torch.arange(-300, 1 if causal else 300)
    wanted = T5Attention._relative_position_bucket(distances, not causal, 32, 128)
    assert np.array_equal(buckets_of(distances.numpy(), 32, 128, causal=causal), wanted.numpy())


def test_what_cannot_be_read(tmp_path: Path) -> None:
    cases.saved(cases.model_of("m2m_100"), tmp_path)
    ours = cases.loaded(tmp_path)
    for source, message in (
        ([], "a text has no tokens"),
        ([99], "token id 99 is outside the model's vocabulary of 99"),
        ([5] * 311, "a text of 311 tokens is longer than the 310 positions that this m2m_100 model has"),
        ([5, 1, 6], "a text holds the padding token"),
    ):
        with pytest.raises(UsageError, match=message):
            ours.encode([source], 4)
    cache = ours.encode([[5, 6]], 400)
    with pytest.raises(UsageError, match="longer than the 310 positions"):
        ours.run(Batch.of([[5] * 311], [0]), cache)


def test_configurations_that_are_refused(tmp_path: Path) -> None:
    config = json.loads((cases.saved(cases.model_of("bart"), tmp_path) / "config.json").read_text())
    for change, message in (
        ({"decoder_attention_heads": 4}, "encoder_attention_heads 2 is not supported; it must be decoder_attention_"),
        ({"normalize_before": True}, "normalize_before True is not supported for model_type 'bart', only False"),
        ({"activation_function": "mish"}, "activation_function is 'mish'"),
    ):
        with pytest.raises((CheckpointError, UnsupportedError), match=message):
            spec_from_config({**config, **change})


def test_a_bias_of_logits_of_another_size(tmp_path: Path) -> None:
    cases.saved(cases.model_of("marian"), tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "final_logits_bias": torch.zeros(1, 98)}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"final_logits_bias has shape \(1, 98\), but config.json asks for"):
        cases.loaded(tmp_path)
