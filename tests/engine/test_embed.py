"""Embeddings are what pooling by hand makes of transformers' hidden states."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import encoder_cases as cases
import numpy as np
import pytest
import torch
from encoder_cases import assert_near
from numpy.typing import NDArray
from safetensors.torch import save_file

from kbit.backends.cpu.backend import NativeBackend
from kbit.engine.embed import Embedder, similarities
from kbit.engine.pooling import pool
from kbit.host.errors import CheckpointError, KbitError, UnsupportedError, UsageError
from kbit.models.opening import open_model
from kbit.text.sentence_config import POOLINGS, read_sentence_config

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = ["the cat sat on the mat .", "a dog ran far away", "who ?"]
PREFIX = "sentence_transformers.models."


def write(folder: Path, values: Any, name: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(values))


def sentence_folder(folder: Path, model: Any, pooling: dict[str, Any], *more: str, **transformer: Any) -> Path:
    """A folder as sentence-transformers saves it; `more`: modules after pooling."""
    cases.saved(model, folder)
    kinds = ["Transformer", "Pooling", *more]
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": PREFIX + kind}
        for i, kind in enumerate(kinds)
    ]
    write(folder, modules, "modules.json")
    write(folder, {"word_embedding_dimension": 32, **pooling}, "1_Pooling/config.json")
    write(folder, transformer, "sentence_bert_config.json")
    return folder


def embedder(folder: Path, **settings: Any) -> Embedder:
    with open_model(str(folder)) as source:
        return Embedder(source, NativeBackend(2, compute="fp32", kv="fp32"), **settings)


def states(model: Any, text: str, folder: Path, longest: int = 10**6) -> NDArray[np.float32]:
    """Hidden states as transformers makes them, its tokenizer included."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    read = tokenizer([text], truncation=True, max_length=longest, return_tensors="pt")
    with torch.no_grad():
        found: NDArray[np.float32] = model(read["input_ids"]).last_hidden_state[0].numpy()
    return found


def by_hand(x: NDArray[np.float32], kind: str) -> NDArray[np.float32]:
    if kind in ("cls", "lasttoken"):
        return x[0 if kind == "cls" else -1]
    if kind == "max":
        return x.max(0)
    weights = np.arange(1, len(x) + 1) if kind == "weightedmean" else np.ones(len(x))
    divisor = len(x) ** 0.5 if kind == "mean_sqrt_len" else weights.sum()
    return (x * weights[:, None]).sum(0) / divisor


def test_every_pooling_alone_and_beside_others(tmp_path: Path) -> None:
    model = cases.model_of("Bert")
    keys = {
        "cls": "cls_token",
        "max": "max_tokens",
        "mean": "mean_tokens",
        "mean_sqrt_len": "mean_sqrt_len_tokens",
        "weightedmean": "weightedmean_tokens",
        "lasttoken": "lasttoken",
    }
    sentence_folder(tmp_path, model, {f"pooling_mode_{key}": True for key in keys.values()})
    everything = embedder(tmp_path)
    assert everything.config.pooling == POOLINGS
    found = everything.embed(TEXTS).vectors
    for row, text in zip(found, TEXTS, strict=True):
        x = states(model, text, tmp_path)
        for part, kind in zip(np.split(row, len(POOLINGS)), POOLINGS, strict=True):
            assert_near(part, by_hand(x, kind))
    assert_near(embedder(tmp_path, pooling=["cls"]).embed(TEXTS).vectors, found[:, :32])
    sentence_folder(tmp_path, model, {"pooling_mode": "weightedmean"})  # as newer versions write it
    assert_near(embedder(tmp_path).embed(TEXTS).vectors, found[:, 128:160])


def test_dense_layers_and_normalisation(tmp_path: Path) -> None:
    model = cases.model_of("Gemma3Text")
    folder = sentence_folder(tmp_path, model, {"pooling_mode_mean_tokens": True}, "Dense", "Dense", "Normalize")
    torch.manual_seed(1)
    layers = [torch.nn.Linear(32, 48, bias=False), torch.nn.Linear(48, 8)]
    for number, (layer, activation) in enumerate(zip(layers, ("Identity", "Tanh"), strict=True), 2):
        about = {
            "in_features": layer.in_features,
            "out_features": layer.out_features,
            "bias": layer.bias is not None,
            "activation_function": f"torch.nn.modules.activation.{activation}",
        }
        write(folder, about, f"{number}_Dense/config.json")
        named = {f"linear.{name}": tensor.detach() for name, tensor in layer.named_parameters()}
        save_file(named, folder / f"{number}_Dense/model.safetensors")
    found = embedder(folder).embed(TEXTS).vectors
    for row, text in zip(found, TEXTS, strict=True):
        pooled = torch.from_numpy(states(model, text, folder)).mean(0)
        wanted = torch.tanh(layers[1](layers[0](pooled))).detach()
        assert_near(row, wanted / wanted.norm())
    assert_near(similarities(found[:1], found[1:2]), (found[:1] * found[1:2]).sum(-1))
    (folder / "2_Dense/model.safetensors").rename(folder / "2_Dense/pytorch_model.bin")
    with pytest.raises(UnsupportedError, match=r"2_Dense/pytorch_model.bin: pickled weights"):
        embedder(folder)
    save_file({"linear.weight": torch.zeros(48, 31)}, folder / "2_Dense/model.safetensors")
    with pytest.raises(CheckpointError, match=r"2_Dense/model.safetensors holds .*\(48, 31\)"):
        embedder(folder)
    (folder / "2_Dense/model.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(CheckpointError, match=r"2_Dense/model.safetensors is damaged"):
        embedder(folder)


def test_prompts_count_unless_the_model_says_otherwise(tmp_path: Path) -> None:
    model = cases.model_of("Bert")
    folder = sentence_folder(tmp_path, model, {"pooling_mode_mean_tokens": True, "include_prompt": False})
    prompts = {"query": "who ran ? ", "": "a "}
    write(folder, {"prompts": prompts, "default_prompt_name": "query"}, "config_sentence_transformers.json")
    ours = embedder(folder)
    assert (ours.prompt(None), ours.prompt("")) == ("who ran ? ", "a ")
    with pytest.raises(UsageError, match="no prompt named 'passage': it has query"):
        ours.prompt("passage")
    x = states(model, "who ran ? the cat", folder)
    # [CLS] who ran ? are left out, as sentence-transformers masks as many tokens as the prompt alone has but its end.
    assert_near(ours.embed(["the cat"], "who ran ? ").vectors[0], x[4:].mean(0))
    assert_near(pool(x, ("cls",), 4), x[0])
    write(folder, {"pooling_mode_mean_tokens": True}, "1_Pooling/config.json")
    assert_near(embedder(folder).embed(["the cat"], "who ran ? ").vectors[0], x.mean(0))


def test_long_texts(tmp_path: Path) -> None:
    model = cases.model_of("Bert")
    folder = sentence_folder(
        tmp_path, model, {"pooling_mode_mean_tokens": True}, "Normalize", max_seq_length=6, do_lower_case=True
    )
    text = "THE cat sat on the mat far away ."
    ours = embedder(folder)
    assert ours.longest == 6
    found = ours.embed([text, "A dog"])
    assert (found.tokens, found.cut, found.windows) == ((11, 4), (0,), ())
    x = states(model, text, folder, 6)
    assert_near(found.vectors[0], x.mean(0) / np.linalg.norm(x.mean(0)))
    whole = ours.embed([text], long="windows")
    assert (whole.cut, whole.windows) == ((), (0,))
    parts = [states(model, part, folder) for part in ("the cat sat on", "the mat far away", ".")]
    mean = np.concatenate(parts).mean(0)
    assert_near(whole.vectors[0], mean / np.linalg.norm(mean))
    with pytest.raises(UsageError, match="text 1 has 11 tokens, and this model takes 6"):
        ours.embed([text], long="refuse")
    longer = embedder(folder, longest=300, normalize=False).embed([text])
    assert longer.cut == ()
    assert_near(longer.vectors[0], states(model, text, folder).mean(0))
    with pytest.raises(UsageError, match="texts of 311 tokens: this model takes 1 to 310"):
        embedder(folder, longest=311)


def test_the_last_token_of_a_causal_model(tmp_path: Path) -> None:
    """Qwen3-Embedding: of a text alone and beside longer ones; as the model without a head, or as one whose head is
    not there (it is published so)."""
    model = cases.model_of("Qwen3")
    folder = sentence_folder(tmp_path, model, {"pooling_mode_lasttoken": True}, "Normalize")
    config = json.loads((folder / "config.json").read_text())
    for architecture in ("Qwen3Model", "Qwen3ForCausalLM"):
        write(folder, {**config, "architectures": [architecture]}, "config.json")
        found = embedder(folder).embed(TEXTS).vectors
        for row, text in zip(found, TEXTS, strict=True):
            last = states(model, text, folder)[-1]
            assert_near(row, last / np.linalg.norm(last))


def test_without_modules_a_mean_is_assumed(tmp_path: Path) -> None:
    model = cases.model_of("Bert")
    cases.saved(model, tmp_path)
    ours = embedder(tmp_path)
    assert not ours.config.published
    assert_near(ours.embed(TEXTS[:1]).vectors[0], states(model, TEXTS[0], tmp_path).mean(0))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"modules.json": "{"}, "modules.json is not valid JSON"),
        ({"modules.json": "{}"}, "modules.json is not a list of modules"),
        (
            {"modules.json": '[{"type": "a.Transformer", "path": ""}]'},
            "modules are Transformer; kbit runs Transformer, Pooling",
        ),
        ({"modules.json": "@WordWeights"}, "modules.json: WordWeights is not supported"),
        ({"modules.json": "@"}, "1_P/config.json is missing, which modules.json names"),
        ({"modules.json": "@", "1_P/config.json": "[]"}, "1_P/config.json holds a list"),
        ({"modules.json": "@", "1_P/config.json": "{}"}, "pooling by nothing is not supported"),
        ({"modules.json": "@", "1_P/config.json": '{"pooling_mode": "median"}'}, "pooling 'median' is not supported"),
        ({"modules.json": "@", "1_P/config.json": '{"pooling_mode_mean_tokens": 1}'}, "pooling_mode_mean_tokens is 1"),
        ({"sentence_bert_config.json": '{"max_seq_length": 0}'}, "max_seq_length is 0"),
        ({"sentence_bert_config.json": '{"do_lower_case": "no"}'}, "do_lower_case is 'no'"),
        ({"config_sentence_transformers.json": '{"prompts": ["a"]}'}, "prompts is "),
        ({"config_sentence_transformers.json": '{"default_prompt_name": "q"}'}, "default_prompt_name is 'q'"),
    ],
)
def test_senseless_files_are_named(files: dict[str, str], message: str) -> None:
    def module(kind: str) -> dict[str, str]:
        return {"type": f"a.{kind}", "path": f"1_{kind[0]}"}

    text = files.get("modules.json", "")
    if text.startswith("@"):
        kinds = ["Transformer", "Pooling", *([text[1:]] if text[1:] else [])]
        files = {**files, "modules.json": json.dumps([module(kind) for kind in kinds])}
    with pytest.raises(KbitError, match=message):
        read_sentence_config({name: text.encode() for name, text in files.items()}, "here")


def test_paths_of_modules_do_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    folder = sentence_folder(tmp_path / "model", cases.model_of("Bert"), {"pooling_mode_mean_tokens": True})
    write(tmp_path, {"pooling_mode_cls_token": True}, "config.json")
    modules = json.loads((folder / "modules.json").read_text())
    for path in ("..", "../x", "/etc"):
        modules[1]["path"] = path
        write(folder, modules, "modules.json")
        with pytest.raises(CheckpointError, match="config.json is missing, which modules.json names"):
            embedder(folder)
