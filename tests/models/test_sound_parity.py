"""An encoder of sound is what transformers makes of the same files: states, logits, pieces and batches."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import encoder_decoder_cases as cases
import numpy as np
import pytest
import sound_cases as sounds
import torch
import transformers
from encoder_decoder_cases import assert_near
from safetensors.torch import load_file, save_file

from kbit.backends.reference.backend import ReferenceBackend
from kbit.graph.batch import Batch
from kbit.host.errors import CheckpointError, UnsupportedError, UsageError
from kbit.models.families import spec_from_config
from kbit.models.opening import open_model
from kbit.models.sound import gathered

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder, model = tmp_path_factory.mktemp("whisper"), sounds.whisper()
    return sounds.saved_whisper(model, folder), model


def test_states_and_logits(whisper: tuple[Path, Any]) -> None:
    """Sounds at once, their texts in pieces and a token at a time, longer than a page."""
    folder, model = whisper
    heard, texts = sounds.features(sounds.FRAMES, sounds.FRAMES), cases.ids_of(70, 70, seed=5)
    wanted = [sounds.theirs(model, *pair) for pair in zip(heard, texts, strict=True)]
    for backend in (cases.native(), ReferenceBackend()):
        ours = cases.loaded(folder, backend)
        for found, (states, _) in zip(ours.sound_states(heard), wanted, strict=True):
            assert_near(found, states)
        cache = ours.encode_sounds(heard, 70)
        parts = []
        for begin, end in ((0, 66), (66, 69), (69, 70)):
            batch = Batch.of([text[begin:end] for text in texts], cache.lengths, "all")
            parts.append(np.split(ours.run(batch, cache), 2))
        for row, (_, logits) in enumerate(wanted):
            assert_near(np.concatenate([part[row] for part in parts]), logits)


@pytest.mark.parametrize(
    ("frames", "features", "taps", "stride"), [(7, 5, 3, 1), (8, 3, 3, 2), (7, 2, 5, 2), (1, 4, 3, 2)]
)
def test_a_convolution_is_a_product_of_gathered_rows(frames: int, features: int, taps: int, stride: int) -> None:
    generator = torch.Generator().manual_seed(frames)
    x, weight = (torch.randn(*shape, generator=generator) for shape in ((frames, features), (6, features, taps)))
    wanted = torch.nn.functional.conv1d(x.T[None], weight, stride=stride, padding=taps // 2)[0].T
    found = gathered(x.numpy(), taps, stride) @ weight.reshape(6, -1).numpy().T
    # Sums of 25 terms at most, in another order.
    assert np.abs(found - wanted.numpy()).max() <= 25 * 2.0**-23 * float(
        x.abs().max() * weight.abs().sum(dim=(1, 2)).max()
    )


def test_a_row_does_not_depend_on_the_batch(whisper: tuple[Path, Any]) -> None:
    ours, heard, texts = cases.loaded(whisper[0]), sounds.features(sounds.FRAMES, sounds.FRAMES), cases.ids_of(5, 5)
    together = ours.encode_sounds(heard, 5)
    both = ours.run(Batch.of(texts, together.lengths, "all"), together)
    alone = ours.encode_sounds(heard[1:], 5)
    assert np.array_equal(both[5:], ours.run(Batch.of(texts[1:], alone.lengths, "all"), alone))


def test_absent_keys_take_transformers_defaults() -> None:
    sizes = {
        f"{s}_{key}": value
        for s in ("encoder", "decoder")
        for key, value in (("layers", 3), ("ffn_dim", 37), ("attention_heads", 2))
    }
    sparse = {"model_type": "whisper", "vocab_size": 99, "d_model": 32, **sizes}
    full = transformers.WhisperConfig(**{k: v for k, v in sparse.items() if k != "model_type"})
    assert spec_from_config(sparse) == spec_from_config(full.to_dict())


def test_convolutions_are_read_as_matrices(whisper: tuple[Path, Any]) -> None:
    stored = load_file(whisper[0] / "model.safetensors")
    with open_model(str(whisper[0])) as source:
        for name in ("model.encoder.conv1.weight", "model.encoder.conv2.weight"):
            assert torch.equal(source.read(name), stored[name].flatten(1))
            assert source.tensors[name].shape == tuple(stored[name].flatten(1).shape)


def test_names_without_the_models_prefix_and_a_stored_head(whisper: tuple[Path, Any], tmp_path: Path) -> None:
    """`WhisperModel` saves `encoder.conv1.weight`; older files have the tied head again."""
    _, model = whisper
    model.model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "proj_out.weight": tensors["decoder.embed_tokens.weight"].clone()}, file, {"format": "pt"})
    (heard,), (text,) = sounds.features(sounds.FRAMES), cases.ids_of(4, seed=5)
    ours = cases.loaded(tmp_path)
    cache = ours.encode_sounds([heard], 4)
    assert_near(ours.run(Batch.of([text], cache.lengths, "all"), cache), sounds.theirs(model, heard, text)[1])


def test_what_cannot_be_heard(whisper: tuple[Path, Any]) -> None:
    ours = cases.loaded(whisper[0])
    with pytest.raises(
        UsageError, match=r"a sound has \(150, 20\) frames and features, and this whisper model reads \(200, 20\)"
    ):
        ours.encode_sounds(sounds.features(150), 4)
    with pytest.raises(UsageError, match="a whisper model reads sound, and no text: use kbit transcribe"):
        ours.encode([[5]], 4)


def test_a_pass_without_frames(whisper: tuple[Path, Any]) -> None:
    """Neither backend computes with what is not there."""
    for backend in (cases.native(), ReferenceBackend()):
        ours = cases.loaded(whisper[0], backend)
        cache = backend.new_cache(3, 1, 2, 16, 5)
        cache.reserve([5])
        bare = Batch.of([[0] * 5], [0], "all")
        for batch in (bare, replace(bare, features=np.zeros((5, 7), dtype=np.float32))):
            with pytest.raises(ValueError, match="features"):
                ours._encode.hidden(batch, cache)


def test_a_model_of_texts_hears_nothing(tmp_path: Path) -> None:
    cases.saved(cases.model_of("bart"), tmp_path)
    ours = cases.loaded(tmp_path)
    assert ours.sound_frames == 0
    with pytest.raises(UsageError, match="a bart model reads texts, not sounds"):
        ours.encode_sounds(sounds.features(200), 4)


def test_what_is_refused(whisper: tuple[Path, Any], tmp_path: Path) -> None:
    config = json.loads((whisper[0] / "config.json").read_text())
    for change, message in (
        ({"architectures": ["WhisperForAudioClassification"]}, "WhisperForAudioClassification.*is not supported"),
        ({"num_mel_bins": 0}, "num_mel_bins is 0"),
        ({"decoder_attention_heads": 4}, "must be decoder_attention_heads"),
    ):
        with pytest.raises((CheckpointError, UnsupportedError), match=message):
            spec_from_config({**config, **change})
    tensors = load_file(whisper[0] / "model.safetensors")
    name = "model.encoder.conv1.weight"
    save_file({**tensors, name: tensors[name][:, :, :2].contiguous()}, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match=r"conv1.weight has shape \(32, 40\), but config.json asks for \(32, 60\)"
    ):
        cases.loaded(tmp_path)
