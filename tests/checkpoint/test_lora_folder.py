"""LoRA adapters as PEFT, axolotl and unsloth leave them: opened as the model that they make of their base.

The judge is PEFT's own merge where it is installed; the formula of the paper otherwise.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from kbit.backends.cpu.prepared import find
from kbit.checkpoint.prepared_place import prepared_path
from kbit.checkpoint.resolve import open_model
from kbit.checkpoint.source import CheckpointSource
from kbit.engine.loader import load_model
from kbit.host.errors import CheckpointError, KbitError, UnsupportedError
from kbit.host.notes import KbitNote
from kbit.models.canonical import canonical

HIDDEN, KEYS, RANK = 32, 16, 3
SIZES = {"hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
Q, V, UP = (f"model.layers.1.{name}" for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"))
SHAPES = {Q: (HIDDEN, HIDDEN), V: (KEYS, HIDDEN), UP: (48, HIDDEN)}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("lora") / "base"
    config = LlamaConfig(vocab_size=64, max_position_embeddings=64, num_key_value_heads=2, **SIZES)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    from tokenizers import Tokenizer, models

    Tokenizer(models.BPE({"a": 0, "b": 1}, [])).save(str(folder / "tokenizer.json"))
    return folder


def adapter(folder: Path, base: Path | str, extra: dict[str, torch.Tensor] | None = None, **settings: Any) -> Path:
    """An adapter of some matrices, in PEFT's names."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, (rows, columns) in SHAPES.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator)
    save_file(tensors | (extra or {}), folder / "adapter_model.safetensors")
    written = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": RANK, "lora_alpha": 6, **settings}
    (folder / "adapter_config.json").write_text(json.dumps(written))
    return folder


def opened(folder: Path, note: str = "a LoRA of rank") -> CheckpointSource:
    with pytest.warns(KbitNote, match=note):
        return open_model(str(folder))


def check_merged(folder: Path, base: Path, scales: dict[str, float]) -> None:
    """What is opened is W + s B A in float32; all else is the base's, as the base has it."""
    factors, plain = load_file(folder / "adapter_model.safetensors"), load_file(base / "model.safetensors")
    with opened(folder, r"a LoRA of rank 3 is added to 3 matrices of .* in float32") as source:
        for name, weight in plain.items():
            info, module = source.tensors[name], name.removesuffix(".weight")
            if module not in SHAPES:
                assert info.stored_as == "BF16"
                assert torch.equal(source.read(name), weight.float())
                continue
            down, up = (factors[f"base_model.model.{module}.lora_{part}.weight"] for part in "AB")
            wanted = weight.double() + scales[module] * (up.double() @ down.double())
            assert info.stored_as == "F32"
            found = source.read_weight(name)
            assert isinstance(found, torch.Tensor)
            # Each entry is a sum of RANK products and one more.
            bound = (RANK + 2) * 2**-24 * (weight.double().abs() + scales[module] * (up.abs() @ down.abs()).double())
            assert bool(((found - wanted).abs() <= bound).all())
            assert torch.equal(source.read_rows(name, 3, 9), found[3:9])


def test_factors_are_added_to_their_base(base: Path, tmp_path: Path) -> None:
    check_merged(adapter(tmp_path / "a", base), base, dict.fromkeys(SHAPES, 2.0))


def test_scales_of_ranks_and_patterns(base: Path, tmp_path: Path) -> None:
    settings = {"use_rslora": True, "alpha_pattern": {"q_proj": 12, r"layers\.0\.mlp\.up_proj": 1}}
    root = RANK**-0.5
    check_merged(adapter(tmp_path / "a", base, **settings), base, {Q: 12 * root, V: 6 * root, UP: 6 * root})


def test_a_base_beside_the_adapter(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "base")
    check_merged(adapter(tmp_path / "a", "../base"), base, dict.fromkeys(SHAPES, 2.0))


def test_what_is_saved_whole_replaces_the_bases(base: Path, tmp_path: Path) -> None:
    """modules_to_save, and an embedding that grew by the tokens of a chat template."""
    rows, head = torch.randn(70, HIDDEN), torch.randn(70, HIDDEN)
    prefix = "base_model.model."
    extra = {f"{prefix}model.embed_tokens.weight": rows, f"{prefix}lm_head.weight": head}
    folder = adapter(tmp_path / "a", base, extra)
    with canonical(opened(folder, "and 2 replaced")) as source:
        assert source.config["vocab_size"] == 70
        assert torch.equal(source.read("model.embed_tokens.weight"), rows)
        assert torch.equal(source.read("lm_head.weight"), head)


def test_axolotls_and_unsloths_folders(base: Path, tmp_path: Path) -> None:
    """A training's output: the base's configuration beside the adapter, earlier checkpoints, states of the trainer."""
    folder = adapter(tmp_path / "out", base, task_type="CAUSAL_LM", unsloth_fixed=True, inference_mode=True)
    for name in ("checkpoint-500", "checkpoint-1000"):
        adapter(folder / name, base)
        for state in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin"):
            (folder / name / state).write_bytes(b"PK\x03\x04")
    config = json.loads((base / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "unsloth_version": "2025.1", "torch_dtype": "bfloat16"}))
    (folder / "training_args.bin").write_bytes(b"PK\x03\x04")
    (folder / "README.md").write_text("---\nlibrary_name: peft\n---\n")
    check_merged(folder, base, dict.fromkeys(SHAPES, 2.0))
    check_merged(folder / "checkpoint-1000", base, dict.fromkeys(SHAPES, 2.0))
    (folder / "adapter_model.safetensors").unlink()
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"no config.json in this folder \(but there is one in .*checkpoint-1000\)"
    ):
        open_model(str(folder))


def test_an_adapters_own_tokenizer_is_used_alone(base: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a", base)
    (base / "added_tokens.json").write_text('{"<old>": 63}')
    try:
        with opened(folder) as source:
            assert set(source.sidecar_files()) >= {"tokenizer.json", "added_tokens.json", "generation_config.json"}
        (folder / "tokenizer.json").write_text("{}")
        with opened(folder) as source:
            assert source.sidecar_files()["tokenizer.json"] == b"{}"
            assert "added_tokens.json" not in source.sidecar_files()
    finally:
        (base / "added_tokens.json").unlink()


def test_prepared_weights_are_of_adapter_and_base(base: Path, tmp_path: Path) -> None:
    """An adapter runs, and another state of its base is another model."""
    moved = shutil.copytree(base, tmp_path / "base")
    folder = adapter(tmp_path / "a", moved)
    ids, logits = [1, 5, 9], []
    for change in (False, False, True):
        if change:
            tensors = load_file(moved / "model.safetensors")
            save_file({n: t * 2 if n.startswith(V) else t for n, t in tensors.items()}, moved / "model.safetensors")
        model = load_model(str(folder), backend="native", compute="fp32")
        assert model.prepared is not None
        logits.append(torch.from_numpy(model.decoder.extend(ids, model.decoder.new_cache(1, 4))))
        assert find(folder) is not None
    assert torch.equal(logits[0], logits[1])
    assert not torch.allclose(logits[0], logits[2], atol=1e-4)


def test_prepared_weights_of_an_adapter_whose_base_is_the_hubs(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are kept as of others, and are of the snapshot in the hub's cache; another one is another model."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = adapter(tmp_path / "a", "org/base")
    storage = tmp_path / "hub" / "models--org--base"
    places = []
    for commit in ("1" * 40, "2" * 40):
        shutil.copytree(base, storage / "snapshots" / commit)
        (storage / "refs").mkdir(exist_ok=True)
        (storage / "refs" / "main").write_text(commit)
        monkeypatch.setattr("kbit.checkpoint.hub._fetched", lambda model: storage / "snapshots" / commit)  # noqa: B023
        assert load_model(str(folder), backend="native", compute="fp32").prepared is not None
        assert find(folder) is not None
        places.append(prepared_path(folder))
    assert None not in places
    assert places[0] != places[1]
    shutil.rmtree(storage)
    assert prepared_path(folder) is None


def test_transposed_factors_of_gpt2(tmp_path: Path) -> None:
    """GPT-2 publishes (inputs, outputs): what is added is the transpose."""
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=32, n_embd=32, n_layer=1, n_head=2)).save_pretrained(
        tmp_path / "base"
    )
    name = "transformer.h.0.attn.c_attn"
    factors = {"A": torch.randn(2, 32), "B": torch.randn(96, 2)}
    (tmp_path / "a").mkdir()
    tensors = {f"base_model.model.{name}.lora_{part}.weight": tensor for part, tensor in factors.items()}
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "base_model_name_or_path": "../base", "lora_alpha": 2, "fan_in_fan_out": True}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(settings))
    with opened(tmp_path / "a") as source, open_model(str(tmp_path / "base")) as plain:
        key = next(key for key in plain.tensors if key.endswith("attn.c_attn.weight"))
        wanted = plain.read(key) + (factors["B"] @ factors["A"]).T
        assert torch.allclose(source.read(key), wanted, atol=1e-6)


@pytest.mark.parametrize("rslora", [False, True])
def test_as_peft_merges(base: Path, tmp_path: Path, rslora: bool) -> None:
    peft = pytest.importorskip("peft")
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = peft.LoraConfig(
        r=4, target_modules=["q_proj", "down_proj", "embed_tokens"], init_lora_weights=False, use_rslora=rslora,
        rank_pattern={"down_proj": 2}, alpha_pattern={"q_proj": 3}, modules_to_save=["lm_head"],
    )  # fmt: skip
    wrapped = peft.get_peft_model(model, settings)
    wrapped.save_pretrained(tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": str(base)}))
    merged = wrapped.merge_and_unload().state_dict()
    with opened(tmp_path / "a") as source:
        for name in source.tensors:
            assert torch.allclose(source.read(name), merged[name].float(), rtol=1e-5, atol=1e-6), name


def test_pickled_factors_are_converted_by_the_line_that_is_printed(base: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a", base)
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UnsupportedError, match="is a pickle") as refused:
        open_model(str(folder))
    command = re.search(r"python (-c .*)$", str(refused.value))
    assert command
    subprocess.run([sys.executable, *shlex.split(command[1])], check=True, capture_output=True, timeout=300)
    check_merged(folder, base, dict.fromkeys(SHAPES, 2.0))


REFUSED: dict[str, tuple[dict[str, Any], type[KbitError], str]] = {
    "another kind": ({"peft_type": "IA3"}, UnsupportedError, "its kind is IA3; merge it with peft"),
    "dora": ({"use_dora": True}, UnsupportedError, "it is a DoRA"),
    "no base": ({"base_model_name_or_path": None}, CheckpointError, "base_model_name_or_path is missing"),
    "a base that is not here": (
        {"base_model_name_or_path": "/no/such/folder"},
        KbitError,
        "a LoRA adapter of /no/such/folder, which cannot be opened .*write its folder into adapter_config.json",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_merged_is_refused(base: Path, tmp_path: Path, name: str) -> None:
    settings, kind, line = REFUSED[name]
    with pytest.raises(kind, match=line):
        open_model(str(adapter(tmp_path / "a", base, **settings)))


def test_another_models_adapter_is_refused(base: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, num_key_value_heads=2, **{**SIZES, "intermediate_size": 40})
    LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"make 48 x 32 numbers, but .* is 40 x 32: it is another base's"):
        open_model(str(adapter(tmp_path / "a", tmp_path / "other")))
    fewer = LlamaConfig(vocab_size=64, num_key_value_heads=2, **{**SIZES, "num_hidden_layers": 1})
    LlamaForCausalLM(fewer).save_pretrained(tmp_path / "fewer")
    with pytest.raises(CheckpointError, match=r"layers\.1\..* does not have: check base_model_name_or_path"):
        open_model(str(adapter(tmp_path / "b", tmp_path / "fewer")))
