"""Exporting a model as GGUF, and what is in the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kbit.checkpoint.gguf.header import read_header
from kbit.checkpoint.source import StoredSource
from kbit.models.export_gguf import ExportedGGUF, export_gguf
from kbit.models.opening import open_model


def opened(model: Path) -> StoredSource:
    source = open_model(str(model))
    assert isinstance(source, StoredSource)
    return source


def export(model: Path, out: Path, **options: Any) -> ExportedGGUF:
    with opened(model) as source:
        return export_gguf(source, out, **options)


def stored(path: Path) -> dict[str, tuple[str, bytes]]:
    """The tensors of a file: types and bytes."""
    header, data = read_header(path), path.read_bytes()
    return {
        name: (tensor.type.name, data[tensor.offset : tensor.offset + tensor.nbytes])
        for name, tensor in header.tensors.items()
    }


def byte_tokenizer(folder: Path, size: int) -> None:
    """A tokenizer of bytes, some merges and some special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n")]
    texts = [*alphabet, *(left + right for left, right in merges)]
    made = Tokenizer(models.BPE({text: index for index, text in enumerate(texts)}, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([f"<|{index}|>" for index in range(len(texts), size)])
    made.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": f"<|{size - 1}|>",
        "chat_template": "{{ x }}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
