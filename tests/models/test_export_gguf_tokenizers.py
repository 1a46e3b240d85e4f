"""Tokenizers as GGUF metadata: the same read back; and what cannot be said refused."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest
from decoder_cases import saved_model
from gguf_export_cases import byte_tokenizer, export, opened

from kbit.checkpoint.gguf.header import read_header
from kbit.checkpoint.gguf.tokenizer import sidecars_from_header
from kbit.host.errors import UnsupportedError

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_tokenizer_is_the_same_read_back(tmp_path: Path, packable_model: Path) -> None:
    """Ids of texts, special tokens, what is added to a text, chat templates."""
    from kbit.text.tokenizer import Tokenizer

    folder = tmp_path / "m"
    saved_model("llama", folder, vocab_size=270)
    byte_tokenizer(folder, 266)
    export(folder, tmp_path / "m.gguf")
    header = read_header(tmp_path / "m.gguf")
    tokens = header.strings("tokenizer.ggml.tokens") or []
    assert (len(tokens), tokens[256:262], tokens[-4:]) == (
        270,
        ["th", "the", "Ġthe", "in", "<|260|>", "<|261|>"],
        [f"[PAD{i}]" for i in range(266, 270)],
    )
    assert (header.integers("tokenizer.ggml.token_type") or [])[258:] == [1, 1] + [3] * 6 + [5] * 4
    assert header.string("tokenizer.ggml.pre") == "gpt-2"
    with opened(folder) as source, opened(tmp_path / "m.gguf") as again:
        ours, theirs = Tokenizer.from_source(source), Tokenizer.from_source(again)
        text = "the thing in <|262|> the"
        assert ours.encode(text) == theirs.encode(text)
        assert (
            (ours.eos_ids, ours.chat_templates)
            == (theirs.eos_ids, theirs.chat_templates)
            == ({265}, {"default": "{{ x }}"})
        )


DATA = Path(os.environ.get("KBIT_DATA", "no-such-folder")) / "tokenizers"


VOCABULARIES = ("llama-spm", "deepseek-coder")


@pytest.mark.parametrize("name", VOCABULARIES)
def test_real_vocabularies(tmp_path: Path, name: str) -> None:
    """llama.cpp's own, through tokenizer.json and back: the same metadata, of SentencePiece but for the size of scores."""
    path = DATA / f"ggml-vocab-{name}.gguf"
    if not path.is_file():
        pytest.skip(f"{path} is not there (KBIT_DATA)")
    from tokenizers import Tokenizer as Library

    from kbit.checkpoint.gguf.tokenizer_out import check_same, tokenizer_metadata

    header = read_header(path)
    library = Library.from_buffer(sidecars_from_header(header, 2048)["tokenizer.json"])
    ids = {key: header.integer(f"tokenizer.ggml.{key}_token_id") for key in ("bos", "eos", "padding", "unknown")}
    unknown = ids["unknown"] if name == "llama-spm" else None
    tokens = header.strings("tokenizer.ggml.tokens") or []
    eos = [ids["eos"]] if ids["eos"] is not None else []
    found = tokenizer_metadata(
        library, len(tokens), name, bos=ids["bos"], eos=eos, pad=ids["padding"], unknown=unknown, templates={}
    )
    assert found["tokenizer.ggml.tokens"] == tokens
    if "tokenizer.ggml.merges" in header and name != "llama-spm":
        assert found["tokenizer.ggml.merges"] == header.strings("tokenizer.ggml.merges")
        assert found["tokenizer.ggml.pre"] in (header.string("tokenizer.ggml.pre"), "smollm")
    else:
        scores, made = header.numbers("tokenizer.ggml.scores") or [], found["tokenizer.ggml.scores"]
        assert isinstance(made, list)
        types = header.integers("tokenizer.ggml.token_type") or []
        normal = [index for index, kind in enumerate(types) if kind == 1 and len(tokens[index]) > 1]
        assert all(isinstance(made[index], float) for index in normal)
        order = sorted(normal, key=lambda index: -float(made[index]))  # type: ignore[arg-type]
        assert all(scores[one] >= scores[other] for one, other in itertools.pairwise(order))
    saved_model(
        "llama", tmp_path / "m", vocab_size=len(tokens), hidden_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    (tmp_path / "m" / "tokenizer.json").write_text(library.to_str())
    names = {"bos_token": ids["bos"], "eos_token": ids["eos"], "unk_token": unknown}
    settings = {key: tokens[index] for key, index in names.items() if index is not None}
    (tmp_path / "m" / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **settings})
    )
    export(tmp_path / "m", tmp_path / "m.gguf")
    again = Library.from_buffer(sidecars_from_header(read_header(tmp_path / "m.gguf"), 2048)["tokenizer.json"])
    check_same(library, again, name)
    texts = (path.parent / f"{path.name}.inp").read_text().split("\n__ggml_vocab_test__\n")
    wanted = [
        [int(each) for each in line.split()] for line in (path.parent / f"{path.name}.out").read_text().splitlines()
    ]
    assert len(wanted) > 40
    assert [again.encode(text, add_special_tokens=False).ids for text in texts[: len(wanted)]] == wanted


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "GGUF has no name that kbit knows for a pre-tokenizer"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "GGUF has no name for a pre-tokenizer with Whitespace"),
        ({"model": {"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0]], "byte_fallback": True}}, "kbit writes no Unigram tokenizer that has bytes"),
    ],
)  # fmt: skip
def test_tokenizers_that_it_cannot_say(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = tmp_path / "m"
    saved_model("llama", folder, vocab_size=270)
    byte_tokenizer(folder, 266)
    parsed = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**parsed, **change}))
    with pytest.raises(UnsupportedError, match=message + ".*--to safetensors"):
        export(tmp_path / "m", tmp_path / "m.gguf")
