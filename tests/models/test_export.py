"""What is exported, opened by transformers: the model it came from, in every layout that families publish in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from decoder_cases import CASES, TINY, saved_model
from safetensors.torch import load_file

from kbit.backends.reference.backend import ReferenceBackend
from kbit.formats.registry import parse_format
from kbit.host.errors import KbitError, UsageError
from kbit.models.export import export_safetensors
from kbit.models.load import load_decoder
from kbit.models.opening import open_model
from kbit.quantizers.convert import convert
from kbit.quantizers.plan import make_plan

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")

# One of each layout: as canonical tensors, with fused matrices, with norms less 1, with interleaved rows, tied, lying
# down, by head; experts one by one, and in stacks of two kinds; latent attention; by group.
FAMILIES = ("qwen2", "phi3", "gemma2", "gemma3", "glm4", "ernie4_5", "gpt2", "gpt_neox", "opt", "falcon", "qwen3-moe")
FAMILIES += ("olmo", "glm4-moe", "gpt-oss", "granitemoe", "deepseek-v3", "minicpm3", "gemma4-e", "gemma4-moe")
FAMILIES += (
    "falcon-40b",
    "mpt",
    "qwen3-next",
    "qwen3_5-biases",
    "codegen",
    "phi",
    "nemotron",
    "lfm2-biases",
    "lfm2-moe",
    "granite-hybrid",
    "granite-hybrid-moe",
    "bamba",
)

# One case of every class that these are not of.
_PREFIXES = {CASES[case][0] for case in FAMILIES}
_OTHERS = {prefix: case for case, (prefix, _) in reversed(CASES.items()) if prefix not in _PREFIXES}.values()


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    model = saved_model(request.param, folder)
    model.half().save_pretrained(folder)
    return folder


def test_an_export_is_what_was_published(folder: Path, tmp_path: Path) -> None:
    with open_model(str(folder)) as source:
        done = export_safetensors(source, tmp_path / "out", "fp16")
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    assert after.keys() == before.keys() - {"lm_head.weight"} or after.keys() == before.keys()
    for name, tensor in after.items():
        # Norms go through 1 + w in float32, and back.
        assert torch.allclose(tensor.float(), before[name].float(), rtol=2**-11, atol=2**-23), name
    assert done.error < 2**-11
    assert done.tensors == len(after)


def test_transformers_computes_what_the_quantized_model_does(folder: Path, tmp_path: Path) -> None:
    with open_model(str(folder)) as source:
        convert(source, make_plan(source, parse_format("nf4-b16")), tmp_path / "q")
    with open_model(str(tmp_path / "q")) as source:
        done = export_safetensors(source, tmp_path / "out", "fp32")
        ours = load_decoder(source, ReferenceBackend())
        ids = torch.randint(1, TINY["vocab_size"], (2, 20), generator=torch.Generator().manual_seed(1))
        found = ours.forward(ids, ours.new_cache(2, 20))
    assert done.error == 0.0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager", experts_implementation="eager"
    ).eval()
    with torch.no_grad():
        expected = theirs(ids).logits
    # Gemma multiplies embeddings with a root that is rounded to the type of the weights, which is another one now.
    # (Gemma 4 has two such roots.)
    allowed = {"gemma2": 2**-10, "gemma3_text": 2**-10, "gemma4_text": 2**-8}.get(config["model_type"], 1e-4)
    assert float((found - expected).abs().max() / expected.abs().max()) <= allowed


@pytest.mark.parametrize("case", _OTHERS)
def test_tensors_have_the_shapes_that_transformers_has(case: str, tmp_path: Path) -> None:
    """A case of every other family; of stacks of experts, which transformers takes apart, it opens what is written."""
    saved_model(case, tmp_path / "m")
    with open_model(str(tmp_path / "m")) as source:
        export_safetensors(source, tmp_path / "out", "fp32")
    before, after = (load_file(path / "model.safetensors") for path in (tmp_path / "m", tmp_path / "out"))
    if case == "qwen3_5-moe":
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        before = {name: tensor for name, tensor in before.items() if ".experts." not in name}
        after = {name: tensor for name, tensor in after.items() if ".experts." not in name}
    assert after.keys() - before.keys() <= {"lm_head.weight"}
    assert before.keys() - after.keys() <= {"lm_head.weight"}
    for name in before.keys() & after.keys():
        assert after[name].shape == before[name].shape, name
        assert torch.allclose(after[name], before[name], rtol=2**-20, atol=2**-23), name


def test_convolutions_of_sounds_have_all_their_axes(tmp_path: Path) -> None:
    from sound_cases import saved_whisper, whisper

    saved_whisper(whisper(), tmp_path / "m")
    with open_model(str(tmp_path / "m")) as source:
        export_safetensors(source, tmp_path / "out", "fp32")
    before, after = (load_file(path / "model.safetensors") for path in (tmp_path / "m", tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_values_that_do_not_fit(tmp_path: Path, write_model: Any) -> None:
    folder = write_model(tmp_path / "m", dtype=torch.float32)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = 7e4
    from safetensors.torch import save_file

    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with open_model(str(folder)) as source:
        with pytest.raises(KbitError, match=r"model\.norm\.weight holds values up to 7e\+04, which fp16 cannot"):
            export_safetensors(source, tmp_path / "out", "fp16")
        assert not (tmp_path / "out").exists()
        export_safetensors(source, tmp_path / "out", "bf16")  # as the error says
        with pytest.raises(UsageError):
            export_safetensors(source, tmp_path / "out", "bf16")
        again = export_safetensors(source, tmp_path / "out", "fp32", overwrite=True, shard_bytes=40_000)
    assert again.error == 0.0
    with open_model(str(tmp_path / "out")) as source:  # in several files
        assert float(source.read("model.norm.weight")[3]) == 7e4
        assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
