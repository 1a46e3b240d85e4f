"""What kbit could not run is refused by `kbit quantize` and named by `kbit info`, both without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from kbit.checkpoint.resolve import open_model
from kbit.cli.main import build
from kbit.cli.model_summary import summarise
from kbit.host.errors import CheckpointError, KbitError
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


def test_quantize_refuses_a_tied_head_that_differs(tmp_path: Path, write_model: Callable[..., Path]) -> None:
    """The conversion would store the embedding alone and lose the head."""
    folder = change(write_model(tmp_path / "m"), other_head)
    for more in ([], ["--dry-run"]):
        with pytest.raises(CheckpointError, match=r"tie_word_embeddings is true, but lm_head\.weight differs"):
            CliRunner().invoke(
                build([]),
                ["quantize", str(folder), "--method", "rtn", "-o", str(tmp_path / "o"), *more],
                catch_exceptions=False,
            )
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    with open_model(str(folder)) as source:
        spec = spec_from_config(source.config)
        check_tensors(source, spec, read_data=False)  # headers alone cannot tell
        with pytest.raises(CheckpointError, match="differs"):
            check_tensors(source, spec)


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
def test_no_torch(tiny_model: Path, command: list[str]) -> None:
    code = """
import sys
from kbit.cli.main import build
build([])(sys.argv[1:], standalone_mode=False)
print(*sorted({"torch", "numpy"} & sys.modules.keys()), file=sys.stderr)
"""
    arguments = [sys.executable, "-c", code, *command, str(tiny_model)]
    result = subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=300)
    assert "model.norm.weight" in result.stdout or "tensors" in result.stdout
    assert result.stderr.strip() == ""
