"""Folders as people have them: files left over from other tools beside a complete model, and names with prefixes.

The judge of what the model is, is the model as transformers saved it.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_model_cases import Model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from kbit.checkpoint.readers.hf_folder import INDEX_NAME
from kbit.checkpoint.resolve import open_model
from kbit.engine.loader import load_model
from kbit.host.errors import CheckpointError, KbitError, UnsupportedError, UsageError
from kbit.host.notes import KbitNote

UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama as transformers saves it, whole."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    folder = tmp_path_factory.mktemp("saved") / "whole"
    LlamaForCausalLM(LlamaConfig(vocab_size=64, max_position_embeddings=64, **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "model")


def shard(model: Path) -> None:
    """The same model in several files, with an index."""
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(model / "sharded", max_shard_size="20KB")


def edit_config(model: Path, **changes: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def check_same(model: Path, saved: Path, note: str | None) -> None:
    """The folder opens as the saved model, and says what it chose."""
    if note is None:
        with warnings.catch_warnings():
            warnings.simplefilter("error", KbitNote)
            source = open_model(str(model))
    else:
        with pytest.warns(KbitNote, match=note):
            source = open_model(str(model))
    expected = load_file(saved / "model.safetensors")
    with source:
        assert source.tensors.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(source.read(name), tensor.float())


def stale_index(model: Path) -> None:
    (model / INDEX_NAME).write_text(json.dumps({"weight_map": {UP: "model-00001-of-00002.safetensors"}}))


def index_of_another_model(model: Path) -> None:
    save_file({"a.b": torch.ones(2)}, model / "model-00001-of-00001.safetensors")
    (model / INDEX_NAME).write_text(
        json.dumps({"weight_map": {UP: "gone.safetensors", "a.b": "model-00001-of-00001.safetensors"}})
    )


def shards_of_the_same_model(model: Path) -> None:
    """Both complete: as in transformers the whole file counts."""
    shard(model)
    for path in (model / "sharded").glob("model*"):
        shutil.copy(path, model)
    first = min(model.glob("model-*.safetensors"))
    save_file({name: tensor + 1 for name, tensor in load_file(first).items()}, first)


def part_of_a_model(model: Path) -> None:
    """model.safetensors of another tool holds one tensor; the shards are the model."""
    shard(model)
    for path in (model / "sharded").glob("model*"):
        shutil.copy(path, model)
    save_file({UP: torch.zeros(48, 32)}, model / "model.safetensors")


def shards_without_index(model: Path) -> None:
    shard(model)
    (model / "model.safetensors").unlink()
    for path in (model / "sharded").glob("model-*.safetensors"):
        shutil.copy(path, model)


def consolidated(model: Path) -> None:
    """Mistral's repositories hold the weights twice."""
    shards_without_index(model)
    save_file({"layers.0.w1": torch.ones(2)}, model / "consolidated.safetensors")


def adapter_files(model: Path) -> None:
    """A merged model in the folder of the training."""
    (model / "model.safetensors").rename(model / "merged.safetensors")
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    save_file({"x.lora_A.weight": torch.ones(2, 2)}, model / "adapter_model.safetensors")


def prefixed(prefix: str) -> Callable[[Path], None]:
    def edit(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        save_file({prefix + name: tensor for name, tensor in tensors.items()}, model / "model.safetensors")

    return edit


def old_keys(model: Path) -> None:
    """What transformers 4 wrote."""
    edit_config(model, torch_dtype="float16", rope_scaling=None, rope_theta=10000.0, use_cache=True)
    (model / "pytorch_model.bin.index.json").write_text('{"weight_map": {"x": "pytorch_model-00001-of-00002.bin"}}')
    (model / "training_args.bin").write_bytes(b"PK\x03\x04")


def runtime_quantization(model: Path) -> None:
    """QLoRA merges keep what told transformers to pack the weights as it loads them."""
    edit_config(model, quantization_config={"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "_load_in_4bit": True})


def axolotl(model: Path) -> None:
    """A whole fine-tune's output: earlier checkpoints below, states of the trainer and of DeepSpeed, pickles beside."""
    for steps in (500, 1000):
        shutil.copytree(model, model / f"checkpoint-{steps}", ignore=shutil.ignore_patterns("checkpoint-*"))
        for name in (
            "optimizer.bin",
            "scheduler.pt",
            "rng_state_0.pth",
            "zero_to_fp32.py",
            "latest",
            "trainer_state.json",
        ):
            (model / f"checkpoint-{steps}" / name).write_bytes(b"x")
    for name in ("pytorch_model.bin", "training_args.bin", "debug.log", "README.md", "all_results.json"):
        (model / name).write_bytes(b"x")
    edit_config(model, use_cache=False, _name_or_path="org/base", transformers_version="4.45.0.dev0")


def unsloth(model: Path) -> None:
    """What unsloth writes into the configuration, and its base's name, whose weights were packed."""
    keys = {"unsloth_fixed": True, "unsloth_version": "2025.1.5", "pad_token_id": 63, "torch_dtype": "bfloat16"}
    edit_config(model, _name_or_path="unsloth/llama-3-8b-bnb-4bit", pretraining_tp=1, **keys)


# What was done to the folder -> what is said about it.
LEFTOVERS: dict[str, tuple[Callable[[Path], object], str | None]] = {
    "nothing": (lambda model: None, None),
    "a stale index": (stale_index, f"model.safetensors is used, and not the files that {INDEX_NAME} lists"),
    "an index of another model": (index_of_another_model, "model.safetensors is used, and not"),
    "an index that is damaged": (lambda m: (m / INDEX_NAME).write_text("{"), "not valid JSON.*model.safetensors is used"),
    "shards of the same model": (shards_of_the_same_model, "model.safetensors is used, and not"),
    "a part of a model": (part_of_a_model, f"the files that {INDEX_NAME} lists are used; model.safetensors lacks"),
    "shards without an index": (shards_without_index, f"no {INDEX_NAME}; model-00001-of-.* are used"),
    "consolidated weights": (consolidated, f"no {INDEX_NAME}; model-00001-of-.* are used"),
    "an adapter's files": (adapter_files, None),
    "a GGUF file": (lambda m: Model().write(m / "m.gguf"), "safetensors files are the model; m.gguf beside them"),
    "several GGUF files": (
        lambda m: [Model().write(m / f"{name}.gguf") for name in "ab"], "the model; a.gguf beside them is not used",
    ),
    "old keys": (old_keys, None),
    "axolotl's output": (axolotl, None),
    "unsloth's keys": (unsloth, None),
    "quantization at run time": (runtime_quantization, "bitsandbytes is named .* but the weights are plain"),
    "what AutoGPTQ leaves": (
        lambda m: (m / "quantize_config.json").write_text('{"bits": 4}'), "gptq is named .* but the weights are plain",
    ),
    "names of PEFT": (prefixed("base_model.model."), "begins with base_model.model., which is left out"),
    "names of torch.compile": (prefixed("_orig_mod."), "begins with _orig_mod., which is left out"),
    "names of both": (prefixed("module._orig_mod."), "begins with module._orig_mod., which is left out"),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFTOVERS)
def test_the_complete_model_is_taken(model: Path, saved: Path, name: str) -> None:
    edit, note = LEFTOVERS[name]
    edit(model)
    check_same(model, saved, note)


def test_transformers_takes_the_same_file(model: Path, saved: Path) -> None:
    """Where a whole model and shards are both complete."""
    shards_of_the_same_model(model)
    theirs = AutoModelForCausalLM.from_pretrained(model).state_dict()
    for name, tensor in load_file(saved / "model.safetensors").items():
        assert torch.equal(theirs[name], tensor)


def test_logits_of_a_folder_with_prefixes(model: Path, saved: Path) -> None:
    prefixed("base_model.model.")(model)
    from tokenizers import Tokenizer, models

    Tokenizer(models.BPE({"a": 0}, [])).save(str(model / "tokenizer.json"))
    with pytest.warns(KbitNote):
        ours = load_model(str(model), backend="reference").decoder
    ids = list(range(2, 14))
    found = torch.from_numpy(ours.extend(ids, ours.new_cache(1, len(ids)), last_only=False))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(saved)(torch.tensor([ids])).logits[0]
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6)


# --- GGUF ------------------------------------------------------------------------------------------------------------


def test_a_configuration_beside_a_gguf_file(tmp_path: Path) -> None:
    Model().write(tmp_path / "m.gguf")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.warns(KbitNote, match="m.gguf is the model; config.json beside it is not used"):
        source = open_model(str(tmp_path))
    assert source.config["model_type"] == "llama"


def test_a_projector_is_no_model(tmp_path: Path) -> None:
    Model().write(tmp_path / "m.gguf")
    (tmp_path / "mmproj-m-f16.gguf").write_bytes(b"GGUF")
    assert open_model(str(tmp_path)).path == tmp_path / "m.gguf"


def test_the_parts_of_one_gguf_file(tmp_path: Path) -> None:
    """A folder with nothing but these stands for the model; without one of them, for nothing."""
    import gguf

    whole = Model().write(tmp_path / "whole.gguf")
    reader = gguf.GGUFReader(whole)
    folder = tmp_path / "parts"
    folder.mkdir()
    tensors = reader.tensors
    for number in range(2):
        writer = gguf.GGUFWriter(folder / f"m-{number + 1:05d}-of-00002.gguf", "llama")
        if number == 0:
            for key, field in reader.fields.items():
                if not key.startswith("GGUF.") and key != "general.architecture":
                    writer.add_key_value(key, field.contents(), field.types[0])
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 2)
        for tensor in tensors[number::2]:
            writer.add_tensor(tensor.name, tensor.data)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    with open_model(str(folder)) as parts, open_model(str(whole)) as expected:
        assert parts.tensors.keys() == expected.tensors.keys()
        assert all(torch.equal(parts.read(name), expected.read(name)) for name in parts.tensors)
    shutil.copy(folder / "m-00001-of-00002.gguf", tmp_path / "whole.gguf")
    (folder / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(CheckpointError, match="part 2 of 2, m-00002-of-00002.gguf, is missing"):
        open_model(str(folder))
    Model().write(folder / "other.gguf")
    with pytest.raises(UsageError, match="holds 2 GGUF files; name one"):
        open_model(str(folder))


# --- what stays refused ----------------------------------------------------------------------------------------------


def some_shards(model: Path) -> None:
    shards_without_index(model)
    min(model.glob("model-*.safetensors")).unlink()


def packed(model: Path) -> None:
    runtime_quantization(model)
    tensors = load_file(model / "model.safetensors")
    tensors[UP] = torch.zeros(768, 1, dtype=torch.uint8)
    save_file({**tensors, f"{UP}.absmax": torch.ones(24)}, model / "model.safetensors")


REFUSED: dict[str, tuple[Callable[[Path], object], type[KbitError], str]] = {
    "some of the shards": (some_shards, CheckpointError, f"safetensors files but no {INDEX_NAME}"),
    "a weight that bitsandbytes has packed, without its state": (
        packed,
        CheckpointError,
        "weight.absmax belongs to a packed weight, but its other tensors are missing",
    ),
    "a LoRA around the weights": (
        lambda m: save_file({"model.layers.0.mlp.up_proj.base_layer.weight": torch.ones(2)}, m / "model.safetensors"),
        UnsupportedError,
        "up_proj.base_layer.weight is a weight with a LoRA beside it: merge them first",
    ),
    "an adapter with a configuration": (
        lambda m: [
            (m / "model.safetensors").rename(m / "adapter_model.safetensors"),
            (m / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}'),
        ],
        UnsupportedError,
        "an adapter that kbit does not merge: its kind is None; merge it with peft",
    ),
    "a trainer's output": (
        lambda m: [shutil.copytree(m, m / "checkpoint-500"), (m / "config.json").unlink()],
        CheckpointError,
        "no config.json in this folder .but there is one in .*checkpoint-500",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_complete_is_refused(model: Path, name: str) -> None:
    edit, kind, message = REFUSED[name]
    edit(model)
    with pytest.raises(kind, match=message):
        open_model(str(model))
