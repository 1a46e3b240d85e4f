"""Tokenizer metadata that is refused, and files without any."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from gguf_file_cases import write_gguf
from gguf_model_cases import VOCAB, Model, config_of
from gguf_tokenizer_cases import Metadata, byte_level

from kbit.checkpoint.gguf.header import read_header
from kbit.checkpoint.gguf.tokenizer import sidecars_from_header
from kbit.host.errors import CheckpointError, KbitError, UnsupportedError
from kbit.host.notes import KbitNote


def change(**keys: Any) -> Callable[[Metadata], None]:
    def edit(metadata: Metadata) -> None:
        metadata.keys.update(keys)

    return edit


def spm(edit: Callable[[Metadata], None]) -> Callable[[Metadata], None]:
    def convert(metadata: Metadata) -> None:
        metadata.keys = {
            "model": "llama",
            "tokens": ["<unk>", "<s>", "</s>", "a", "b", "ab"],
            "scores": [0.0, 0.0, 0.0, -1.0, -2.0, -3.0],
            "token_type": [2, 3, 3, 1, 1, 1],
        }
        edit(metadata)

    return convert


REFUSED: dict[str, tuple[Callable[[Metadata], None], type[KbitError], str]] = {
    "another model": (change(model="rwkv"), UnsupportedError, "tokenizer model 'rwkv' is not supported"),
    "unigrams without scores": (change(model="t5"), CheckpointError, "scores is not a finite number for each token"),
    "unknown pre-tokenizer": (change(pre="new-one"), UnsupportedError, "pre-tokenizer 'new-one' is not supported; known"),
    "no pre-tokenizer": (change(pre=None), CheckpointError, "'tokenizer.ggml.pre' is missing"),
    "no tokens": (change(tokens=None), CheckpointError, "'tokenizer.ggml.tokens' is missing or empty"),
    "no merges": (change(merges=None), CheckpointError, "'tokenizer.ggml.merges' is missing"),
    "tokens of another type": (change(tokens=[1, 2]), CheckpointError, "should be an array of strings"),
    "duplicate token": (
        lambda metadata: metadata.keys["tokens"].__setitem__(5, metadata.keys["tokens"][4]),
        CheckpointError,
        "appears twice in the vocabulary (ids 4 and 5)",
    ),
    "too few types": (change(token_type=[1, 1]), CheckpointError, "token_type has 2 entries for 275 tokens"),
    "merge without space": (change(merges=["ab"]), CheckpointError, "merge 0 of the tokenizer, 'ab', does not join"),
    "merge to no token": (change(merges=["a b"]), CheckpointError, "merge 0 of the tokenizer, 'a b', does not join"),
    "eos outside": (change(eos_token_id=276), CheckpointError, "'tokenizer.ggml.eos_token_id' is 276, outside 0 to 274"),
    "eot outside": (change(eot_token_id=999), CheckpointError, "'tokenizer.ggml.eot_token_id' is 999, outside"),
    "bos wanted but unnamed": (
        change(add_bos_token=True, bos_token_id=None), CheckpointError, "'tokenizer.ggml.bos_token_id' is missing",
    ),
    "flag of another type": (change(add_bos_token="yes"), CheckpointError, "should be true or false"),
    "template missing": (
        lambda metadata: metadata.named.update({"tool\nuse": None}),
        CheckpointError,
        "'tokenizer.chat_template.tool\\nuse' is missing",
    ),
    "no scores": (spm(change(scores=None)), CheckpointError, "'tokenizer.ggml.scores' is missing"),
    "too few scores": (spm(change(scores=[0.5])), CheckpointError, "scores has 1 entries for 6 tokens"),
    "score not a number": (
        spm(change(scores=[0.0, 0.0, 0.0, 0.0, 0.0, float("nan")])), CheckpointError, "token 'ab' has the score nan",
    ),
    "endless token": (
        spm(change(tokens=["<unk>", "<s>", "</s>", "a", "b", "a" * 300])), CheckpointError, "has 300 characters",
    ),
    "collapsing whitespace": (
        spm(change(remove_extra_whitespaces=True)), UnsupportedError, "remove_extra_whitespaces is not supported",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_tokenizers_are_named(case: str, tmp_path: Path) -> None:
    edit, error, words = REFUSED[case]
    metadata = byte_level()
    edit(metadata)
    with pytest.raises(error, match=re.escape(words)) as caught:
        metadata.sidecars(tmp_path)
    message = str(caught.value)
    assert "t.gguf" in message
    assert "\n" not in message


def test_a_file_without_tokenizer_has_no_files(tmp_path: Path) -> None:
    write_gguf(tmp_path / "t.gguf", "llama", {}, {})
    assert sidecars_from_header(read_header(tmp_path / "t.gguf"), 2048) == {}


@pytest.mark.parametrize("value", [4294967295, -1, 65535, (1 << 64) - 1, "size"])
@pytest.mark.parametrize("kind", ["byte level", "sentencepiece"])
def test_ids_that_mean_none(tmp_path: Path, kind: str, value: Any) -> None:
    """Writers have no null: they store -1 in whatever type, or the size of the vocabulary."""
    metadata = byte_level()
    if kind == "sentencepiece":
        spm(lambda _: None)(metadata)
    value = len(metadata.keys["tokens"]) if value == "size" else value
    names = ("bos", "padding", "unknown", "eot", "eom")
    metadata.keys |= {f"{name}_token_id": value for name in names} | {"eos_token_id": 2}
    with pytest.warns(KbitNote) as notes:
        files = metadata.sidecars(tmp_path)
    said = {str(note.message) for note in notes}
    assert len(said) == len(names)
    for name in names:
        key = f"tokenizer.ggml.{name}_token_id"
        assert any(
            f"t.gguf: metadata key '{key}' is {value}, which no token has: taken as none" in line for line in said
        )
    assert json.loads(files["generation_config.json"]) == {"eos_token_id": 2}
    config = json.loads(files["tokenizer_config.json"])
    assert {name for name in config if name.endswith("_token") and not name.startswith("add_")} == {"eos_token"}
    backend = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
    assert backend.encode("ab").ids == backend.encode("ab", add_special_tokens=False).ids


def test_a_model_whose_padding_is_none(tmp_path: Path) -> None:
    """The configuration reads the same keys; the embedding may have more rows than there are tokens."""

    def edit(model: Model) -> None:
        model.general |= {"tokenizer.ggml.padding_token_id": 4294967295, "tokenizer.ggml.bos_token_id": VOCAB}

    with pytest.warns(KbitNote, match="taken as none"):
        config = config_of(tmp_path, edit=edit)
    assert not {"bos_token_id", "pad_token_id"} & config.keys()
