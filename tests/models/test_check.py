"""What kbit could not run is refused by `kbit quantize` and named by `kbit info`, both without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from kbit.checkpoint.resolve import open_model
from kbit.checkpoint.surplus import Rule, harmless
from kbit.cli.main import build
from kbit.cli.model_summary import summarise
from kbit.engine.loader import load_model
from kbit.host.errors import CheckpointError, KbitError
from kbit.host.notes import KbitNote
from kbit.models.check import check_tensors
from kbit.models.families import spec_from_config

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object], **config: Any) -> Path:
    """Edits the tensors and config.json of a model."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, **config}))
    return folder


def other_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors[HEAD] = tensors[EMBEDDING].clone()
    tensors[HEAD][-1, -1] += 1


# What is wrong -> edit of the tensors, changes of config.json, what the line says.
BROKEN: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], dict[str, Any], str]] = {
    "missing": (lambda t: t.pop("model.norm.weight"), {}, r"1 tensor \(model\.norm\.weight\) is missing"),
    "shape": (lambda t: None, {"intermediate_size": 96}, r"gate_proj\.weight has shape \(80, 32\), but config"),
    "surplus": (lambda t: t.update(extra=torch.zeros(2, 2)), {}, r"1 tensor \(extra\) is not part of a llama model"),
    "tied shape": (lambda t: t.update({HEAD: torch.zeros(4, 32)}), {}, "tie_word_embeddings is true, but lm_head"),
    "family": (lambda t: None, {"model_type": "mamba"}, "model_type 'mamba' is not supported"),
    "config": (lambda t: None, {"num_key_value_heads": 3}, "num_key_value_heads is 3"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_quantize_refuses_and_info_says_why(tmp_path: Path, write_model: Callable[..., Path], name: str) -> None:
    edit, config, message = BROKEN[name]
    folder = change(write_model(tmp_path / "m"), edit, **config)
    with pytest.raises(KbitError, match=message):
        CliRunner().invoke(
            build([]), ["quantize", str(folder), "--method", "rtn", "-o", str(tmp_path / "out")], catch_exceptions=False
        )
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    with open_model(str(folder)) as source:
        found = summarise(source)
    assert found["runs_on"] == {"cpu": None, "cuda": None}
    with pytest.raises(KbitError, match=message):
        raise KbitError(found["cannot_run"])
    text = CliRunner().invoke(build([]), ["info", str(folder)], catch_exceptions=False).stdout
    assert "cannot run:      " in text
    assert "runs on" not in text


def test_a_tied_head_that_differs_is_used(tmp_path: Path, write_model: Callable[..., Path]) -> None:
    """As in transformers: what is stored counts, whatever config.json says; conversions keep it."""
    folder = change(write_model(tmp_path / "m", dtype=torch.float32), other_head)
    with pytest.warns(
        KbitNote, match=r"tie_word_embeddings is true .*lm_head\.weight is stored and differs from model"
    ):
        ours = load_model(str(folder), backend="reference")
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    ids = list(range(2, 12))
    found = torch.from_numpy(ours.decoder.extend(ids, ours.decoder.new_cache(1, len(ids)), last_only=False))
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0]
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
    arguments = ["quantize", str(folder), "--method", "rtn", "-o", str(tmp_path / "out")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KbitNote)
        assert CliRunner().invoke(build([]), arguments, catch_exceptions=False).exit_code == 0
    with open_model(str(tmp_path / "out")) as source:
        assert source.config["tie_word_embeddings"] is False
        assert torch.equal(source.read(HEAD), source.read(EMBEDDING)) is False
        assert summarise(source)["cannot_run"] is None


def test_a_tied_head_that_differs_is_refused_where_the_reader_let_it_pass(write_model: Any, tmp_path: Path) -> None:
    folder = change(write_model(tmp_path / "m"), other_head)
    with pytest.warns(KbitNote):
        source = open_model(str(folder))
    with source:
        spec = spec_from_config({**source.config, "tie_word_embeddings": True})
        check_tensors(source, spec, read_data=False)  # headers alone cannot tell
        with pytest.raises(CheckpointError, match="differs"):
            check_tensors(source, spec)


# What trainers and exporters leave in a file: name -> tensor.
SURPLUS: dict[str, torch.Tensor] = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    "model.rotary_emb.inv_freq": torch.ones(4),
    "model.layers.0.self_attn.k_scale": torch.ones(()),
    "model.layers.0.self_attn.v_scale": torch.ones(2),
    "model.layers.0.self_attn.k_proj.k_scale": torch.ones(1),
    "model.layers.0.mlp.up_proj.input_scale": torch.ones(()),
    "model.layers.0.mlp.up_proj.output_scale": torch.ones(1),
    "model.layers.1.self_attn.attn.bias": torch.ones(1, 1, 8, 8),
    "model.layers.1.attn.bias": torch.ones(8, 8, dtype=torch.bool),
    "model.layers.1.attn.masked_bias": torch.tensor(-1e4),
    "model.layers.1.norm.num_batches_tracked": torch.tensor(7),
    "model.embeddings.position_ids": torch.arange(8)[None],
    "v_head.summary.weight": torch.ones(1, 32),
    "v_head.summary.bias": torch.ones(1),
    "model.layers.1.mlp.up_proj.lora_A.weight": torch.ones(0, 32),
}
# Alike, but something that changes results may be missing without them.
REFUSED: dict[str, torch.Tensor] = {
    "model.layers.0.mlp.up_proj.input_scale": torch.ones(32),  # per channel: the weights would have its counterpart
    "model.layers.0.mlp.up_proj.weight_scale": torch.ones(80, 1),
    "model.layers.0.self_attn.bias": torch.ones(32),
    "model.layers.0.self_attn.q_norm.weight": torch.ones(8),
    "model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(2, 32),
    "model.layers.2.mlp.up_proj.weight": torch.ones(80, 32),
    "score.weight": torch.ones(2, 32),
}


def test_what_no_result_depends_on_is_left_out(tmp_path: Path, write_model: Callable[..., Path]) -> None:
    plain = write_model(tmp_path / "plain")
    folder = change(write_model(tmp_path / "m"), lambda t: t.update(SURPLUS))
    with open_model(str(folder)) as source, open_model(str(plain)) as without:
        found, expected = summarise(source), summarise(without)
    assert set(found["ignored_tensors"]) == set(SURPLUS)
    assert expected["ignored_tensors"] == {}
    for key in ("cannot_run", "parameters", "tensor_bytes", "formats", "bits_per_weight", "tensors"):
        assert found[key] == expected[key]
    text = CliRunner().invoke(build([]), ["info", str(folder)], catch_exceptions=False).stdout
    assert (
        "left out:        2 tensors (model.layers.0.self_attn.rotary_emb.inv_freq, ...): angles of the rotary" in text
    )
    for model, out in ((folder, "a"), (plain, "b")):
        arguments = ["quantize", str(model), "--method", "rtn", "-o", str(tmp_path / out)]
        assert CliRunner().invoke(build([]), arguments, catch_exceptions=False).exit_code == 0
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", REFUSED)
def test_what_may_change_results_is_refused(tmp_path: Path, write_model: Callable[..., Path], name: str) -> None:
    folder = change(write_model(tmp_path / "m"), lambda t: t.update({name: REFUSED[name]}))
    with open_model(str(folder)) as source:
        with pytest.raises(CheckpointError, match="is not part of a llama model"):
            check_tensors(source, spec_from_config(source.config))
        assert summarise(source)["ignored_tensors"] == {}


def test_a_rule_never_stands_against_a_family(monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    """What a model declares is the model's, whatever its name."""
    monkeypatch.setattr("kbit.checkpoint.surplus.RULES", (Rule(r"weight", "everything"),))
    with open_model(str(tiny_model)) as source:
        assert harmless(source.tensors[EMBEDDING]) == "everything"
        found = summarise(source)
    assert found["ignored_tensors"] == {}
    assert found["cannot_run"] is None


def test_a_tied_head_that_equals_the_embedding_is_fine(tmp_path: Path, write_model: Callable[..., Path]) -> None:
    folder = change(write_model(tmp_path / "m"), lambda t: t.update({HEAD: t[EMBEDDING].clone()}))
    result = CliRunner().invoke(
        build([]), ["quantize", str(folder), "--method", "rtn", "-o", str(tmp_path / "out")], catch_exceptions=False
    )
    assert result.exit_code == 0
    with open_model(str(tmp_path / "out")) as source:
        assert HEAD not in source.tensors
        assert summarise(source)["cannot_run"] is None


def test_info_gives_the_extended_context(tmp_path: Path, write_model: Callable[..., Path]) -> None:
    folder = write_model(tmp_path / "m", rope_scaling={"rope_type": "yarn", "factor": 4.0})
    with open_model(str(folder)) as source:
        found = summarise(source)
    assert found["context_length"] == 4 * 64
    assert found["cannot_run"] is None
    assert found["runs_on"]["cpu"]
    text = CliRunner().invoke(build([]), ["info", str(folder)], catch_exceptions=False).stdout
    assert "context:         256 tokens" in text
    assert "cannot run" not in text


@pytest.mark.parametrize("command", [["info"], ["info", "--json"], ["quantize", "--dry-run"]])
def test_no_torch(tiny_model: Path, tmp_path: Path, command: list[str]) -> None:
    """Of a model that was not calibrated (in a cache of its own); a plan of a calibrated one reads what was weighed. What
    is said of a model's cache comes from the planner, which loads numpy."""
    code = """
import sys
from kbit.cli.main import build
build([])(sys.argv[1:], standalone_mode=False)
unwanted = {"torch"} if sys.argv[1] == "info" else {"torch", "numpy"}
print(*sorted(unwanted & sys.modules.keys()), file=sys.stderr)
"""
    arguments = [sys.executable, "-c", code, *command, str(tiny_model)]
    environment = {**os.environ, "KBIT_CACHE": str(tmp_path)}
    result = subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=300, env=environment)
    assert "model.norm.weight" in result.stdout or "tensors" in result.stdout
    assert result.stderr.strip() == ""


def test_a_tokenizer_that_is_missing_or_too_large_is_told(tmp_path: Path, write_model: Callable[..., Path]) -> None:
    """Before the conversion starts; it is done all the same."""
    folder = write_model(tmp_path / "m", vocab_size=256)
    (folder / "added_tokens.json").write_text('{"<tool>": 256}')
    arguments = ["quantize", str(folder), "--method", "rtn", "--dry-run"]
    with pytest.warns(KbitNote, match="the tokenizer has 257 tokens, the model 256"):
        assert CliRunner().invoke(build([]), arguments, catch_exceptions=False).exit_code == 0
    (folder / "tokenizer.json").unlink()
    with pytest.warns(KbitNote, match="there is no tokenizer.json, so kbit can convert this model, but not run it"):
        assert CliRunner().invoke(build([]), arguments, catch_exceptions=False).exit_code == 0
