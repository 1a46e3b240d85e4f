"""Tokenizer metadata that is refused, and files without any."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from gguf_tokenizer_cases import Metadata, byte_level

from kbit.checkpoint.gguf.header import read_header
from kbit.checkpoint.gguf.tokenizer import sidecars_from_header
from kbit.host.errors import CheckpointError, KbitError, UnsupportedError


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
    "another model": (change(model="t5"), UnsupportedError, "tokenizer model 't5' is not supported"),
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
    "eos outside": (change(eos_token_id=275), CheckpointError, "'tokenizer.ggml.eos_token_id' is 275, outside 0 to 274"),
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
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert sidecars_from_header(read_header(tmp_path / "t.gguf"), 2048) == {}
