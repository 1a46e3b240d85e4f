"""Encoders and encoder-decoders as folders of plain floats: transformers computes with them what it did, and kbit reads
them back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import encoder_cases
import encoder_decoder_cases
import numpy as np
import pytest
import torch
from error_cases import run_command
from safetensors.torch import load_file, save_file

from kbit.backends.reference.backend import ReferenceBackend
from kbit.engine.encoder import Encoder, TokenizedText
from kbit.models.encoder_decoder import load_encoder_decoder
from kbit.models.export import export_safetensors
from kbit.models.opening import open_model

HEADS = ["Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"]
CASES = [("Bert", head) for head in HEADS] + [
    (family, "ForSequenceClassification") for family in encoder_cases.FAMILIES if family not in ("Bert", "NomicBert")
]
# Numbers that transformers sums in another order, as it likes (over two of its own runs of one folder, too): float32 sums
# of at most 310 terms in some ten blocks, as in `encoder_cases.assert_near`.
ROUNDED = 1e-5


def exported(source: Path, out: Path, dtype: str = "fp32") -> Path:
    with open_model(str(source)) as opened:
        done = export_safetensors(opened, out, dtype)
    assert (done.error == 0.0) == (dtype == "fp32")
    return out


def near(found: Any, wanted: Any) -> None:
    assert float(np.abs(found - wanted).max()) <= ROUNDED * float(np.abs(wanted).max())


@pytest.mark.parametrize(("family", "head"), CASES)
def test_transformers_reads_it(family: str, head: str, tmp_path: Path) -> None:
    model = encoder_cases.model_of(family, head)
    folder = exported(encoder_cases.saved(model, tmp_path / "m"), tmp_path / "out")
    again, told = type(model).from_pretrained(folder, output_loading_info=True)
    # (Nothing that kbit runs reads the pooler of a headless model, and kbit does not keep it.)
    assert {name for name in told["missing_keys"] if not name.startswith("pooler.")} == set()
    assert not told["unexpected_keys"]
    ids = torch.tensor([encoder_cases.ids_of(9)[0]])
    with torch.no_grad():
        near(again.eval()(ids)[0].numpy(), model(ids)[0].numpy())
    files = sorted(path.name for path in (tmp_path / "m").iterdir() if path.suffix == ".json")
    assert set(files) <= {path.name for path in folder.iterdir()}


def test_what_is_quantized(tmp_path: Path) -> None:
    """A k-bit encoder becomes the floats that it stands for: kbit embeds with both alike, and so does transformers."""
    model = encoder_cases.model_of("Bert", "ForMaskedLM")
    encoder_cases.saved(model, tmp_path / "m")
    flags = ["--method", "rtn", "--dtype", "nf", "--bits", "3", "--block-size", "16"]
    code, _, err = run_command(["quantize", str(tmp_path / "m"), *flags, "-o", str(tmp_path / "q")])
    assert code == 0, err
    code, said, err = run_command(["export", str(tmp_path / "q"), "-o", str(tmp_path / "out"), "--dtype", "fp32"])
    assert code == 0, err
    assert "every value exact" in said
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    ids = encoder_cases.ids_of(9)[0]
    logits = []
    for folder in ("q", "out"):
        with open_model(str(tmp_path / folder)) as source:
            encoder = Encoder(source, ReferenceBackend())
        logits.append(encoder.logits(encoder.hidden([TokenizedText(ids)])[0]))
    np.testing.assert_array_equal(logits[0], logits[1])
    with torch.no_grad():
        again = type(model).from_pretrained(tmp_path / "out").eval()
        near(again(torch.tensor([ids]))[0][0].numpy(), logits[0])


@pytest.mark.parametrize("name", encoder_decoder_cases.MODELS)
def test_encoder_decoders(name: str, tmp_path: Path) -> None:
    """With what is added to logits (Marian, BART, Pegasus), and twice the same in kbit."""
    model = encoder_decoder_cases.model_of(name)
    folder = exported(encoder_decoder_cases.saved(model, tmp_path / "m"), tmp_path / "out")
    again, told = type(model).from_pretrained(folder, output_loading_info=True)
    assert not told["unexpected_keys"]
    ids = torch.tensor([encoder_decoder_cases.ids_of(9)[0]])
    with torch.no_grad():
        found, wanted = (m.eval()(input_ids=ids, decoder_input_ids=ids[:, :4]).logits.numpy() for m in (again, model))
    near(found, wanted)
    states = []
    for each in (tmp_path / "m", folder):
        with open_model(str(each)) as source:
            loaded = load_encoder_decoder(source, ReferenceBackend())
            assert (loaded.logit_bias is not None) == (name in ("marian", "marian-two", "bart", "mbart", "pegasus"))
            states.append(loaded.states([ids[0].tolist()])[0])
    np.testing.assert_array_equal(states[0], states[1])


def test_without_the_head_that_the_configuration_names(tmp_path: Path) -> None:
    model = encoder_cases.saved(encoder_cases.model_of("MPNet", "ForMaskedLM"), tmp_path / "m")
    weights = load_file(model / "model.safetensors")
    save_file({n: t for n, t in weights.items() if not n.startswith("lm_head")}, model / "model.safetensors")
    kept = load_file(exported(model, tmp_path / "out", "bf16") / "model.safetensors")
    assert kept.keys() == {name.removeprefix("mpnet.") for name in weights if not name.startswith("lm_head")}


@pytest.mark.parametrize(
    ("family", "to", "message"),
    [
        ("Bert", "compressed-tensors", "bert models are exported with --to safetensors only"),
        ("MPNet", "gguf", "kbit writes no GGUF file of a mpnet model, but of bert, nomic_bert, modernbert"),
    ],
)
def test_other_formats_are_refused(family: str, to: str, message: str, tmp_path: Path) -> None:
    model = encoder_cases.saved(encoder_cases.model_of(family), tmp_path / "m")
    code, _, err = run_command(["export", str(model), "-o", str(tmp_path / "out.gguf"), "--to", to])
    assert code == 1
    assert message in err


def test_gguf_files_are_written(tmp_path: Path) -> None:
    model = encoder_cases.saved(encoder_cases.model_of("Bert"), tmp_path / "m")
    code, _, err = run_command(["export", str(model), "-o", str(tmp_path / "out.gguf"), "--to", "gguf"])
    assert code == 0, err
    assert (tmp_path / "out.gguf").is_file()
