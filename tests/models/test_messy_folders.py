"""Folders as some tools leave them, which open as the model that transformers takes them for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from decoder_cases import saved_model
from gguf_export_cases import byte_tokenizer
from safetensors.torch import load_file, save_file

from kbit.formats.registry import parse_format
from kbit.host.notes import KbitNote
from kbit.models.opening import open_model
from kbit.quantizers.convert import convert
from kbit.quantizers.plan import make_plan
from kbit.text.tokenizer import Tokenizer

pytest.importorskip("transformers")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    saved_model("llama", tmp_path / "m", vocab_size=270, tie_word_embeddings=True)
    byte_tokenizer(tmp_path / "m", 266)
    return tmp_path / "m"


def edit(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def marked(name: str) -> Callable[[Path], None]:
    """A file that an editor has put a mark of byte order before."""

    def change(folder: Path) -> None:
        (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())

    return change


CHANGES: dict[str, Callable[[Path], None]] = {
    "quantized by nobody": lambda folder: edit(folder, quantization_config={}),
    "a mark before config.json": marked("config.json"),
    "a mark before tokenizer.json": marked("tokenizer.json"),
    "a mark before tokenizer_config.json": marked("tokenizer_config.json"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_says_nothing(folder: Path, change: str) -> None:
    with open_model(str(folder)) as source:
        wanted = {name: source.read(name) for name in source.tensors}
        ids = Tokenizer.from_source(source).encode("the thing")
    CHANGES[change](folder)
    with open_model(str(folder)) as source:
        assert source.tensors.keys() == wanted.keys()
        assert all(torch.equal(source.read(name), values) for name, values in wanted.items())
        assert Tokenizer.from_source(source).encode("the thing") == ids


def test_a_tied_matrix_under_its_heads_name(folder: Path, tmp_path: Path) -> None:
    """safetensors keeps one name of a shared tensor, and which one is not always the embedding's."""
    tensors = load_file(folder / "model.safetensors")
    embedding = tensors.pop("model.embed_tokens.weight")
    save_file({**tensors, "lm_head.weight": embedding}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(KbitNote, match=r"lm_head.weight is stored and model.embed_tokens.weight is not; they are one"):
        source = open_model(str(folder))
    with source:
        assert torch.equal(source.read("model.embed_tokens.weight"), embedding.float())
        assert "lm_head.weight" not in source.tensors
        convert(source, make_plan(source, parse_format("int8-b16")), tmp_path / "q")
    with open_model(str(tmp_path / "q")) as again:
        assert "model.embed_tokens.weight" in again.tensors


def test_more_templates_in_a_folder_of_their_own(folder: Path, tmp_path: Path) -> None:
    """They are read, and go along when a model is converted."""
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    with open_model(str(folder)) as source:
        convert(source, make_plan(source, parse_format("int8-b16")), tmp_path / "q")
    for model in (folder, tmp_path / "q"):
        with open_model(str(model)) as source:
            templates = Tokenizer.from_source(source).chat_templates
        assert templates == {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
