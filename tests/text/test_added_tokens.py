"""Tokens that stand beside tokenizer.json, against transformers reading the same folder."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer
from typer.testing import CliRunner

from kbit.checkpoint.readers.hf_folder import HFFolder
from kbit.cli.main import build
from kbit.host.errors import CheckpointError
from kbit.host.notes import KbitNote
from kbit.text.added_tokens import add_tokens_of_files
from kbit.text.table_tokenizer import TableTokenizer
from kbit.text.token_table import build_table, open_table
from kbit.text.tokenizer import Tokenizer

TURN = "<|im_start|>user\nHi <tool> there<|im_end|>\n<|im_start|>assistant\n [PAD]<image>x</s>y"
END = {"content": "<|im_end|>", "lstrip": False, "normalized": False, "rstrip": True, "single_word": False}
MARKS = {"<|im_start|>": 258, "<|im_end|>": 259, "<tool>": 260}


def decoder(**flags: bool) -> dict[str, Any]:
    kinds = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True, **flags}
    return {str(index): {"content": text, **kinds} for text, index in MARKS.items()}


# Files beside a tokenizer.json that knows <s> (256, special) and </s> (257, plain), and what transformers makes of them
# is what counts.
CASES: dict[str, dict[str, Any]] = {
    "none": {},
    "added_tokens.json alone": {"added_tokens.json": MARKS},
    "added_tokens.json, in no order": {"added_tokens.json": dict(reversed(MARKS.items()))},
    "added_tokens.json, named in the configuration": {
        "added_tokens.json": MARKS,
        "tokenizer_config.json": {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]},
    },
    "added_tokens.json, named in the map": {
        "added_tokens.json": MARKS,
        "special_tokens_map.json": {"eos_token": END, "additional_special_tokens": ["<|im_start|>"]},
    },
    "the map stands before the configuration": {
        "tokenizer_config.json": {"eos_token": "</s>", "pad_token": "<s>"},
        "special_tokens_map.json": {"eos_token": "<|im_end|>", "pad_token": "[PAD]"},
    },
    "the decoder": {"tokenizer_config.json": {"added_tokens_decoder": decoder()}},
    "the decoder, plain": {"tokenizer_config.json": {"added_tokens_decoder": decoder(special=False, normalized=True)}},
    "the decoder, spaces go": {"tokenizer_config.json": {"added_tokens_decoder": decoder(lstrip=True, rstrip=True)}},
    "the decoder stands before the other files": {
        "tokenizer_config.json": {"added_tokens_decoder": decoder(), "eos_token": "<|im_end|>"},
        "added_tokens.json": {"[PAD]": 261},
        "special_tokens_map.json": {"eos_token": "</s>", "pad_token": "[PAD]"},
    },
    "a decoder of nothing": {
        "tokenizer_config.json": {"added_tokens_decoder": {}, "bos_token": "<s>"},
        "added_tokens.json": MARKS,
    },
    "the decoder changes a token of tokenizer.json": {
        "tokenizer_config.json": {
            "added_tokens_decoder": {"257": {**END, "content": "</s>", "special": True}, **decoder()}
        }
    },
    "named tokens that are nowhere else": {
        "tokenizer_config.json": {"pad_token": "[PAD]", "eos_token": {**END, "__type": "AddedToken"}}
    },
    "a plain token that is named": {"tokenizer_config.json": {"eos_token": "</s>"}},
    "extra tokens": {"tokenizer_config.json": {"extra_special_tokens": ["<|im_start|>", "<tool>"]}},
    "extra tokens by name": {"tokenizer_config.json": {"extra_special_tokens": {"image_token": "<image>"}}},
    "a token of the model's own": {"tokenizer_config.json": {"image_token": "<image>"}},
    "extra tokens of both files": {
        "tokenizer_config.json": {"additional_special_tokens": ["<|im_start|>"]},
        "special_tokens_map.json": {"extra_special_tokens": ["<tool>", "<|im_start|>"]},
    },
}


def plain() -> Backend:
    """A tokenizer of bytes with a special <s> and a plain </s>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({piece: index for index, piece in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=False, normalized=False)])
    return backend


def write(folder: Path, files: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(plain().to_str())
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("kind", ["library", "table"])
@pytest.mark.parametrize("name", CASES)
def test_as_transformers(tmp_path: Path, tiny_model: Path, name: str, kind: str) -> None:
    folder = write(tmp_path / "m", CASES[name])
    for file in ("config.json", "model.safetensors"):
        (folder / file).symlink_to(tiny_model / file)
    theirs = AutoTokenizer.from_pretrained(folder)
    with HFFolder(folder) as source:
        files = source.sidecar_files()
        ours = Tokenizer.from_source(source)
    if kind == "table":
        table = build_table(files["tokenizer.json"], lambda full: add_tokens_of_files(full, files, "m"))
        assert table is not None

        def refuse() -> Backend:
            raise AssertionError("tokenizer.json was parsed")

        ours = Tokenizer(TableTokenizer(open_table(memoryview(table), "table"), refuse))
    assert ours.vocab_size == len(theirs)
    ids = theirs.encode(TURN)
    assert ours.encode(TURN) == ids
    assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    stream = ours.stream()
    assert "".join(map(stream.push, ids)) + stream.finish() == theirs.decode(ids, skip_special_tokens=True)
    if kind == "library":
        assert ours.special_tokens == {
            name: str(token) for name, token in theirs.special_tokens_map.items() if name in NAMES
        }
        for name, token_id in (("bos", ours.bos_id), ("pad", ours.pad_id)):
            assert token_id == getattr(theirs, f"{name}_token_id")
        assert ours.eos_ids == ({theirs.eos_token_id} if theirs.eos_token_id is not None else set())


NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def test_transformers_saves_them_in_both_generations_of_files(tmp_path: Path, tiny_model: Path) -> None:
    """What save_pretrained writes after add_tokens and add_special_tokens reads as the tokenizer that was saved."""
    theirs = AutoTokenizer.from_pretrained(tiny_model)
    theirs.add_tokens(["<tool>", AddedToken("<|im_start|>", normalized=False)])
    theirs.add_special_tokens({"eos_token": "<|im_end|>", "pad_token": "[PAD]"})
    for legacy in (None, True):
        folder = tmp_path / str(legacy)
        theirs.save_pretrained(folder, legacy_format=legacy)
        for file in ("config.json", "model.safetensors"):
            (folder / file).symlink_to(tiny_model / file)
        with HFFolder(folder) as source:
            ours = Tokenizer.from_source(source)
        assert ours.encode(TURN) == theirs.encode(TURN)
        assert ours.decode(ours.encode(TURN)) == theirs.decode(theirs.encode(TURN), skip_special_tokens=True)


def test_an_id_that_the_vocabulary_does_not_give_is_told(tmp_path: Path, tiny_model: Path) -> None:
    folder = write(tmp_path / "m", {"added_tokens.json": {"<tool>": 400}})
    for file in ("config.json", "model.safetensors"):
        (folder / file).symlink_to(tiny_model / file)
    with HFFolder(folder) as source, pytest.warns(KbitNote, match="token '<tool>' has id 400 .* gives it 258"):
        ours = Tokenizer.from_source(source)
    assert ours.encode("<tool>") == AutoTokenizer.from_pretrained(folder).encode("<tool>") == [258]


def test_a_folder_without_other_files_adds_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert add_tokens_of_files(plain(), {}, "m") is False
        assert add_tokens_of_files(plain(), {"tokenizer_config.json": b'{"bos_token": "<s>"}'}, "m") is False


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"added_tokens.json": []}, "added_tokens.json holds a list"),
        ({"added_tokens.json": {"<x>": "many"}}, "added_tokens.json: '<x>': many is not a token id"),
        ({"added_tokens.json": {"<x>": -1}}, "-1 is not a token id"),
        ({"added_tokens.json": {"": 300}}, "expected an object with the token as content"),
        ({"tokenizer_config.json": {"added_tokens_decoder": [1]}}, "added_tokens_decoder .* is .*not an object"),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"x": {"content": "<x>"}}}}, "x is not a token id"),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"300": "<x>"}}}, "300 is <x>: expected an object"),
        (
            {"tokenizer_config.json": {"added_tokens_decoder": {"300": {"content": "<x>", "lstrip": 1}}}},
            "300: lstrip is 1, expected true or false",
        ),
        ({"special_tokens_map.json": 5}, "special_tokens_map.json holds a int"),
    ],
)
def test_senseless_files(files: dict[str, Any], message: str) -> None:
    data = {name: json.dumps(content).encode() for name, content in files.items()}
    with pytest.raises(CheckpointError, match=message):
        add_tokens_of_files(plain(), data, "m")


def test_quantize_keeps_them(tmp_path: Path, write_model: Any) -> None:
    folder = write(write_model(tmp_path / "m", vocab_size=262), {"added_tokens.json": MARKS})
    arguments = ["quantize", str(folder), "--method", "rtn", "-o", str(tmp_path / "out")]
    assert CliRunner().invoke(build([]), arguments, catch_exceptions=False).exit_code == 0
    from kbit.checkpoint.resolve import open_model

    with open_model(str(tmp_path / "out")) as source:
        assert Tokenizer.from_source(source).encode(TURN) == AutoTokenizer.from_pretrained(folder).encode(TURN)
