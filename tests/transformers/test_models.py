"""`kbit.transformers`: rounding on load, folders of kbit quantize, saving and reading back, and doing it wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from encoder_cases import model_of, saved
from error_cases import run_command
from nested_cases import write_mixed

import kbit
from kbit.checkpoint.ladder import Ladder
from kbit.formats.nested import NestedFormat
from kbit.formats.quant_format import QuantFormat
from kbit.host.notes import KbitNote
from kbit.models.export import export_safetensors
from kbit.models.opening import open_model

transformers = pytest.importorskip("transformers", minversion="5")

import kbit.transformers as plugin  # noqa: E402
from kbit.modules.convert import kbit_layers  # noqa: E402
from kbit.modules.embedding import KbitEmbedding  # noqa: E402
from kbit.modules.linear import KbitLinear  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.randint(3, 250, (2, 20), generator=torch.Generator().manual_seed(0))


def load(folder: object, auto: Any = transformers.AutoModelForCausalLM, **options: Any) -> Any:
    return auto.from_pretrained(folder, dtype=torch.float32, **options)


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits
    return found


def near(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for the order of float32 sums: of some 100 terms, in some ten layers, grown tenfold on the way."""
    assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


@pytest.fixture(scope="module")
def quantized(novels_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real model, its embedding k-bit, too, and several formats."""
    out = tmp_path_factory.mktemp("plugin") / "k"
    kbit.quantize(novels_folder, out, bits=4, method="rtn", embedding_bits=6, override={"*v_proj*": "int8-b32"})
    return out


def test_a_real_folder_gives_the_logits_of_kbit(quantized: Path) -> None:
    model = load(quantized)
    with kbit.load(quantized, compute="fp32", threads=1) as engine:
        ids = engine.tokenizer.encode("It was the best of times, it was the worst of times, it was the age of wisdom")
        expected = [token.logprob for token in engine.logprobs(ids)][1:]
    scores = logits(model, torch.tensor([ids]))[0].log_softmax(-1)
    found = [float(scores[at, token]) for at, token in enumerate(ids[1:])]
    assert found == pytest.approx(expected, abs=1e-3)
    layers = dict(kbit_layers(model))
    assert isinstance(layers["model.embed_tokens"], KbitEmbedding)
    assert len(layers) == 23
    assert model.lm_head.parts[0] is model.model.embed_tokens.packed  # tied
    assert not any(parameter.requires_grad for layer in layers.values() for parameter in layer.parameters())
    texts = model.generate(torch.tensor([ids]), max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert texts.shape == (1, len(ids) + 5)


# Fused and transposed; fused with several formats; scaled embeddings and norms less 1; grouped, and a linear of its own.
def test_mixed_nested_widths_are_saved_with_their_order(novels_folder: str, tmp_path: Path) -> None:
    """What transformers saves serves every number of bits that the folder it was loaded from does."""
    folder, again = write_mixed(Path(novels_folder), tmp_path / "k", NestedFormat(2, 4)), tmp_path / "saved"
    model = load(folder)
    model.save_pretrained(again)
    transformers.AutoTokenizer.from_pretrained(novels_folder).save_pretrained(again)
    found = []
    for path in (folder, again):
        with kbit.load(path, bits=2.6, compute="fp32", threads=1, cache_bytes=1 << 22) as engine:
            found.append([token.logprob for token in engine.logprobs("It was the best of times")[1:]])
    assert found[0] == found[1]
    near(logits(load(again)), logits(model))
    model.config.quantization_config.order = {"matrices": ["other"], "steps": [0, 0]}
    with pytest.warns(KbitNote, match="whole numbers of bits only: the order of its widths is for other matrices"):
        model.save_pretrained(again)
    with open_model(str(again)) as source:
        assert Ladder.of(source).order is None


@pytest.mark.parametrize("family", ["gpt2", "phi3", "gemma2", "falcon-40b", "qwen3_5-biases"])
def test_folders_of_other_families(published: Callable[[str], Path], tmp_path: Path, family: str) -> None:
    out, plain = tmp_path / "k", tmp_path / "plain"
    kbit.quantize(published(family), out, format="nf4-b16", method="rtn", override={"*k_proj.weight": "int8-b16"})
    with open_model(str(out)) as source:
        export_safetensors(source, plain, "fp32")
    model, expected = load(out), logits(load(plain))
    found = logits(model)
    near(found, expected)
    packed = sum(isinstance(layer, KbitLinear) for _, layer in kbit_layers(model))
    assert packed >= 12
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved")), found)


def test_an_encoder(tmp_path: Path) -> None:
    folder = saved(model_of("Bert"), tmp_path / "bert")
    kbit.quantize(folder, tmp_path / "k", bits=4, method="rtn")
    model = load(tmp_path / "k", transformers.AutoModel)
    ids = IDS.clamp(max=98)
    with torch.no_grad():
        states = model(ids).last_hidden_state
    with open_model(str(tmp_path / "k")) as source:
        export_safetensors(source, tmp_path / "plain", "fp32")
    with torch.no_grad():
        near(states, load(tmp_path / "plain", transformers.AutoModel)(ids).last_hidden_state)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_rounding_on_load(novels_folder: str, tmp_path: Path, bits: int) -> None:
    """The matrices that `kbit quantize --method rtn` writes; saved and read back bit for bit, by transformers and kbit."""
    model = load(novels_folder, quantization_config=plugin.KbitConfig(bits=bits))
    kbit.quantize(novels_folder, tmp_path / "k", bits=bits, method="rtn")
    with open_model(str(tmp_path / "k")) as source:
        layers = dict(kbit_layers(model))
        assert {f"{name}.weight" for name in layers} == source.config["quantization_config"]["tensors"].keys()
        for name, layer in layers.items():
            expected = source.read_weight(f"{name}.weight")
            for part, values in expected.stored.items():  # type: ignore[union-attr]
                assert torch.equal(layer.parts[0].stored[part], values)
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    one, other = model.state_dict(), again.state_dict()
    assert one.keys() == other.keys()
    assert all(one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(logits(model), logits(again))
    assert again.config.quantization_config.bits == bits
    transformers.AutoTokenizer.from_pretrained(novels_folder).save_pretrained(tmp_path / "saved")
    texts = []
    for folder in (tmp_path / "k", tmp_path / "saved"):
        with kbit.load(folder, threads=1, cache_bytes=1 << 22) as engine:
            texts.append(engine.generate("She went to the", max_tokens=20).text)
    assert texts[0] == texts[1]


def test_what_is_left_alone(novels_folder: str) -> None:
    config = plugin.KbitConfig(format="int4-b32", modules_to_not_convert=["lm_head", "down_proj"], compute="int8")
    model = load(novels_folder, quantization_config=config)
    layers = dict(kbit_layers(model))
    assert not any("down_proj" in name or "lm_head" in name for name in layers)
    assert len(layers) == 18
    assert {str(layer.parts[0].format) for layer in layers.values()} == {"int4-b32"}
    assert {layer.compute for layer in layers.values() if isinstance(layer, KbitLinear)} == {"int8"}
    before = model.model.layers[0].self_attn.q_proj.weight
    plain = model.dequantize()
    assert not list(kbit_layers(plain))
    assert torch.equal(plain.model.layers[0].self_attn.q_proj.weight, before)
    with pytest.raises(kbit.UsageError, match="no linear layer to quantize"):
        load(novels_folder, quantization_config=plugin.KbitConfig(modules_to_not_convert=["model", "lm_head"]))
    with pytest.raises(kbit.UsageError, match="bits 9: use a whole number"):
        plugin.KbitConfig(bits=9)


def test_experts_are_refused_by_name(published: Callable[[str], Path], tmp_path: Path) -> None:
    kbit.quantize(published("qwen3-moe"), tmp_path / "k", format="nf4-b16", method="rtn")
    with pytest.raises(kbit.UnsupportedError, match=r"experts.*in another form.*use kbit export .* -o plain/") as error:
        load(tmp_path / "k")
    assert str(tmp_path / "k") in str(error.value)
    code, _, said = run_command(["export", str(tmp_path / "k"), "-o", str(tmp_path / "plain")])
    assert code == 0, said
    assert logits(load(tmp_path / "plain")).isfinite().all()  # the remedy


def test_a_damaged_folder_is_named(quantized: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "k"
    shutil.copytree(quantized, copy)
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    with pytest.raises(kbit.CheckpointError, match="is damaged"):
        load(copy)


def test_without_the_import_it_fails_aloud(quantized: Path, tmp_path: Path) -> None:
    """Not with random weights. In a process of its own: here it was imported."""
    load(quantized).save_pretrained(tmp_path / "saved")
    code = (
        "import sys, transformers\n"
        "for folder in sys.argv[1:]:\n"
        "    try:\n"
        "        transformers.AutoModelForCausalLM.from_pretrained(folder)\n"
        "    except (ValueError, RuntimeError) as error:\n"
        "        print(' '.join(str(error).split()))\n"
    )
    folders = [str(quantized), str(tmp_path / "saved")]
    done = subprocess.run([sys.executable, "-c", code, *folders], capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert "packed by kbit: import kbit.transformers before from_pretrained" in first
    assert "ignore_mismatched_sizes" in second
    assert "MISMATCH" in done.stderr


def test_a_newer_layout_is_refused(quantized: Path) -> None:
    section = json.loads((quantized / "config.json").read_text())["quantization_config"]
    with pytest.raises(kbit.UnsupportedError, match="layout version 7"):
        plugin.KbitConfig.from_dict({**section, "version": 7})
    assert QuantFormat.parse(plugin.KbitConfig(bits=5).format).bits == 5  # type: ignore[arg-type]
